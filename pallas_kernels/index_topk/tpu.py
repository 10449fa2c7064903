"""Index scores and their exact top-k on TPU, in one pass over the keys.

Blocks of keys stream by; their scores stay in VMEM as integers of the same order. After the last block the picks are
found and written: no score and no mask ever goes to HBM.

In prefill a chunk is 128 entries and its rows are the queries of a tile: a search by counting finds the k-th largest
of every query, then, if some entries tie with it, the index up to which those are picked. In decode (up to 8 queries)
a chunk has a row for each query of a few sequences, and `tpu_select` finds the picks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.index_rows import GROUP as SCALED
from pallas_kernels.index_rows import Fp4Rows, dequantize_index_rows
from pallas_kernels.index_topk.reference import check_shapes
from pallas_kernels.index_topk.tpu_select import (
    NN,
    NT,
    PLANE,
    QUERIES,
    UNROLLED,
    Search,
    as_bf16,
    list_bits,
    product,
    spread_bits,
    turn_bits,
    whole_groups,
)
from pallas_kernels.index_topk.tuning import DECODE_TOKENS, Config, default_config
from pallas_kernels.mask_bits import GROUP, LANES, WORD, MaskBits, words_for
from pallas_kernels.sparse_mla.reference import Indices

ROWS = 8  # sublanes of a register
COUNT_CHUNKS = 8  # chunks of one counting step in prefill
PRODUCT_ROWS = 512  # heads times queries of one product in prefill
PRODUCTS = 8  # of one query and 1024 keys, worked on together in decode
E2M1_UNIT = 2.0**14  # an e2m1 value over that of its code placed as e5m2
HIDDEN = -(2**31)  # below the integer of every score


def index_topk_tpu(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array | Fp4Rows,
    visible: jax.Array,
    *,
    top_k: int,
    chip: Chip,
    scale: jax.Array | None = None,
    as_bits: bool | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Indices | MaskBits:
    """The picks of `reference.pick_entries`; indices ascend instead of being ordered by score.

    Args:
      q: [B, T, H, D <= 128] bf16 or fp32. weights: [B, T, H]. visible: int32 [B, T].
      keys: [B, N, D] in q.dtype, or Fp4Rows, or float8_e4m3fn codes with `scale`, fp32 [B, N], one positive factor per
        entry.
      as_bits: MaskBits rather than Indices; None: from 9 queries a row on.
    Raises:
      ValueError: shapes disagree, `chip` is no TPU, or one tile's scores exceed its VMEM.
    """
    require(chip, "index_topk_tpu", platform="tpu")
    _check(q, weights, keys, visible, scale, top_k)
    q, weights, keys = _whole_registers(q, weights, keys)
    (_, T, _, _), N = q.shape, keys.shape[1]
    config = config or default_config(T, N, chip, q.shape[0])
    top_k = min(top_k, N)
    as_bits = T > DECODE_TOKENS if as_bits is None else as_bits
    decode = T <= DECODE_TOKENS and not as_bits
    if not decode and T <= DECODE_TOKENS:
        config = dataclasses.replace(default_config(DECODE_TOKENS + 1, N, chip), data_dependent=config.data_dependent)
    if decode:
        rows = keys.data if isinstance(keys, Fp4Rows) else keys
        picked = _select_decode(q, weights, rows, visible, scale, top_k, chip, config, interpret)
        return Indices(picked[..., :top_k])
    visible = jnp.clip(visible, 0, N).astype(jnp.int32)
    if isinstance(keys, Fp4Rows):  # in the order and the unit of `_wide_keys`
        q, keys = jnp.concatenate([q[..., 0::2], q[..., 1::2]], axis=-1) * E2M1_UNIT, keys.data
    bits = MaskBits(_select_prefill(q, weights, keys, visible, scale, top_k, chip, config, interpret), N)
    return bits if as_bits else Indices(indices_from_bits_tpu(bits, top_k=top_k, chip=chip, interpret=interpret))


def _check(q, weights, keys, visible, scale, top_k: int) -> None:
    check_shapes("index_topk_tpu", q, weights, keys, visible)
    D = q.shape[3]
    if D > LANES or top_k < 1:
        raise ValueError(f"index_topk_tpu: {D=} must be at most 128 and {top_k=} positive; use the xla op")
    if isinstance(keys, Fp4Rows):
        fits = scale is None
    else:
        fits = scale is None and keys.dtype == q.dtype or scale is not None and keys.dtype == jnp.float8_e4m3fn
    if not fits:
        held = "Fp4Rows" if isinstance(keys, Fp4Rows) else keys.dtype
        raise ValueError(
            f"index_topk_tpu: keys {held} must be {q.dtype} as the queries, Fp4Rows, or float8 codes with a scale"
        )
    if scale is not None and scale.shape != keys.shape[:2]:
        raise ValueError(f"index_topk_tpu: scale {scale.shape} must be {keys.shape[:2]}, one factor per entry")


def _whole_registers(q, weights, keys):
    """Heads of 128 channels, a multiple of 8 of them, for models smaller than the published; zeros change no score."""
    channels, heads = LANES - q.shape[3], -q.shape[2] % ROWS
    if channels and isinstance(keys, Fp4Rows):
        keys = dequantize_index_rows(keys, q.dtype)
    if not (channels or heads):
        return q, weights, keys
    q = jnp.pad(q, ((0, 0), (0, 0), (0, heads), (0, channels)))
    keys = jnp.pad(keys, ((0, 0), (0, 0), (0, channels))) if channels else keys
    return q, jnp.pad(weights, ((0, 0), (0, 0), (0, heads))), keys


@dataclasses.dataclass(frozen=True)
class _Search:
    """How the scores of a tile of queries lie in VMEM ([chunks, rows, 128]) and are counted."""

    chunks: int
    rows: int
    top_k: int
    data_dependent: bool
    has_scale: bool

    @property
    def plane(self) -> tuple[int, int]:
        return self.rows, LANES

    def total(self, x: jax.Array) -> jax.Array:
        """Counts [rows, 128] fp32 -> per query, repeated over the lanes."""
        return jnp.broadcast_to(jnp.sum(x, axis=-1, keepdims=True), self.plane)

    def count(self, scores_ref, steps, threshold: jax.Array) -> jax.Array:
        """How many scores of each query reach its threshold, as fp32 (exact: fewer than 2^24)."""

        def add(i, found):
            scores = scores_ref[pl.ds(i * COUNT_CHUNKS, COUNT_CHUNKS)]
            return found + jnp.sum((scores >= threshold).astype(jnp.float32), axis=0)

        return self.total(jax.lax.fori_loop(0, steps, add, jnp.zeros(self.plane, jnp.float32)))

    def repeat(self, times: int, going, step, state):
        """`step(state)` while `going(state)`, at most `times` times; exactly so often without data_dependent."""
        if not self.data_dependent:
            return jax.lax.fori_loop(0, times, lambda _, s: step(s), state)
        more = lambda s: (s[0] < times) & (jnp.max(going(s[1]).astype(jnp.float32)) > 0)
        return jax.lax.while_loop(more, lambda s: (s[0] + 1, step(s[1])), (0, state))[1]


def _search(scores_ref, visible, steps, find: _Search):
    """The pick of each query as (least score, last entry): all scores above, and those equal up to that entry.

    Every number of a query is repeated over a plane of its scores: broadcasting it in the inner loop costs more than
    the counting.
    """
    want = jnp.minimum(visible, find.top_k).astype(jnp.float32)

    def halve(state):
        low, high, at_low, at_high = state
        middle = (low & high) + ((low ^ high) >> 1)  # their sum could overflow
        found = find.count(scores_ref, steps, middle)
        enough = found >= want
        low, at_low = jnp.where(enough, middle, low), jnp.where(enough, found, at_low)
        return low, jnp.where(enough, high, middle), at_low, jnp.where(enough, at_high, found)

    low = jnp.full(visible.shape, HIDDEN + 1, jnp.int32)
    high = jnp.full(visible.shape, 2**31 - 1, jnp.int32)
    state = low, high, visible.astype(jnp.float32), jnp.zeros(visible.shape, jnp.float32)
    going = lambda s: (s[2] != want) & (s[0] + 1 != s[1])
    least, _, at_least, above = find.repeat(32, going, halve, state)
    last = lambda: _last_of_ties(scores_ref, least, want - above, steps, find)
    if not find.data_dependent:
        return least, last()
    every = lambda: jnp.full(visible.shape, find.chunks * LANES, jnp.int32)
    return least, jax.lax.cond(jnp.max(at_least - want) > 0, last, every)


def _last_of_ties(scores_ref, least, wanted, steps, find: _Search) -> jax.Array:
    """The entry of the wanted-th score that equals `least`: first the chunk that holds it, then where in it."""

    def look(i, state):
        equal = (scores_ref[pl.ds(i * COUNT_CHUNKS, COUNT_CHUNKS)] == least).astype(jnp.float32)
        seen, chunk, left, held = state
        for j in range(COUNT_CHUNKS):
            upto = seen + find.total(equal[j])
            here = (seen < wanted) & (upto >= wanted)
            chunk = jnp.where(here, i * COUNT_CHUNKS + j, chunk)
            left, held = jnp.where(here, wanted - seen, left), jnp.where(here, equal[j], held)
            seen = upto
        return seen, chunk, left, held

    zero = jnp.zeros(find.plane, jnp.float32)
    _, chunk, left, held = jax.lax.fori_loop(0, steps, look, (zero, zero.astype(jnp.int32), zero, zero))
    upto = product(as_bf16(held), as_bf16(_lanes_upto()))
    lane = jax.lax.broadcasted_iota(jnp.int32, find.plane, 1)
    place = jnp.where((held > 0) & (upto == left), lane, 0).astype(jnp.float32)
    return chunk * LANES + find.total(place).astype(jnp.int32)


def _ordered(scores: jax.Array) -> jax.Array:
    """fp32 -> int32 of the same order, with one zero."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(scores == 0, 0, jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


def _dots(q, keys) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    return jax.lax.dot_general(q, keys.astype(q.dtype), NT, precision=precision, preferred_element_type=jnp.float32)


def _wide_keys(rows: jax.Array) -> jax.Array:
    """`Fp4Rows.data` [n, 68] -> keys [n, 128] bfloat16 over 2^14, even channels first; others as they are.

    Codes become floats as in expert_matmul.
    """
    if rows.dtype != jnp.uint8:
        return rows
    half = LANES // 2
    rows = jnp.concatenate([rows, jnp.zeros((rows.shape[0], LANES - rows.shape[1]), jnp.uint8)], axis=1)
    words = pltpu.bitcast(rows, jnp.int32)
    lane = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1)
    words = jnp.where(lane < half, words, pltpu.roll(jax.lax.shift_right_logical(words, 4), half, 1))
    codes = pltpu.bitcast(((words & 0x08080808) << 4) | ((words & 0x07070707) << 1), jnp.float8_e5m2)
    factors = pltpu.bitcast(rows.astype(jnp.uint16), jnp.int32) << 7  # bfloat16 powers of two, of two rows in a word
    lane = jax.lax.broadcasted_iota(jnp.int32, factors.shape, 1)
    spread = jnp.take_along_axis(factors, half + lane % half // (SCALED // 2), axis=1)
    return codes.astype(jnp.bfloat16) * pltpu.bitcast(spread, jnp.bfloat16)


def _score_prefill(q_ref, w_ref, keys_ref, scale_ref, visible, scores_ref, block, config: Config):
    """q [queries, H * 128], w [queries, H], keys [key_block, 128] -> chunks of `scores_ref`."""
    queries, H = w_ref.shape
    together = max(1, min(H, PRODUCT_ROWS // queries))  # a block of keys enters the matrix unit once for so many heads

    def score(i, carry):
        first = pl.multiple_of(i * config.columns, config.columns)
        keys = keys_ref[pl.ds(first, config.columns)]
        keys = _wide_keys(keys)
        total = jnp.zeros((queries, config.columns), jnp.float32)
        for g in range(0, H, together):
            heads = range(g, min(g + together, H))
            rows = jnp.concatenate([q_ref[:, h * LANES : (h + 1) * LANES] for h in heads], axis=0)
            dots = jnp.maximum(_dots(rows, keys), 0)
            for h in heads:
                total += dots[(h - g) * queries : (h - g + 1) * queries] * w_ref[:, h : h + 1]
        if scale_ref is not None:
            total *= scale_ref[:, pl.ds(first, config.columns)]
        entry = block * config.key_block + first + jax.lax.broadcasted_iota(jnp.int32, total.shape, 1)
        total = jnp.where(entry < visible, _ordered(total), HIDDEN)
        for j in range(config.columns // LANES):
            chunk = (block * config.key_block + first) // LANES + j
            scores_ref[chunk] = total[:, j * LANES : (j + 1) * LANES]
        return carry

    jax.lax.fori_loop(0, config.key_block // config.columns, score, 0)


def _score_decode(q_ref, w_ref, keys_ref, scale_ref, seen, scores_ref, slot, block, config: Config, ragged):
    """q and w as `_prepare` leaves them, keys [key_block, 128], scale [key_block / 128, 128] -> rows `slot` .. of each
    chunk of scores.

    seen: how many entries each of the T queries may see.
    """
    T, packed = len(seen), keys_ref.dtype == jnp.uint8
    q, w, H = q_ref[...], w_ref[...], w_ref.shape[0] // T
    width, ahead = ROWS * LANES, config.columns * (2 if packed else 1)

    def score(chunk):
        parts: list[list[jax.Array]] = [[] for _ in range(T)]
        for j in range(0, width, ahead):
            rows = [
                keys_ref[pl.ds(pl.multiple_of(chunk * width + i, LANES), config.columns)]
                for i in range(j, j + ahead, config.columns)
            ]
            dots = jnp.maximum(_dots(q, _paired_keys(rows[0], rows[1], ragged) if packed else rows[0]), 0)
            for half in range(len(rows)):
                for t, lane in itertools.product(range(T), range(0, config.columns, LANES)):
                    first = (half * T + t) * H
                    weighted = dots[first : first + H, lane : lane + LANES] * w[t * H : (t + 1) * H]
                    parts[t].append(jnp.sum(weighted.reshape(-1, ROWS, LANES), axis=0))
        scale = None if scale_ref is None else scale_ref[pl.ds(pl.multiple_of(chunk * ROWS, ROWS), ROWS)]
        chunk += block * (config.key_block // width)
        entry = chunk * width + LANES * jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
        entry += jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
        for t in range(T):
            total = _sum_rows(parts[t]) if scale is None else _sum_rows(parts[t]) * scale
            total = jnp.where(entry < seen[t], _ordered(total), HIDDEN)
            scores_ref[pl.ds(chunk * ROWS * QUERIES + slot + t, ROWS, stride=QUERIES)] = total

    def several(i, carry):
        for j in range(together):  # so that one product overlaps the next
            score(i * together + j)
        return carry

    together = min(config.key_block // width, max(1, PRODUCTS // T))
    jax.lax.fori_loop(0, config.key_block // width // together, several, 0)


def _prepare(q_ref, w_ref, own_q_ref, own_w_ref, packed: bool):
    """q [S, T * H, 128] and w [S, T, H] of S sequences as scoring wants them.

    own_q: the same, or [S, 2 * T * H, 256] for two keys in a row. own_w: fp32 [S, T * H, 128], repeated over lanes.
    """
    for i, (T, H) in enumerate([w_ref.shape[1:]] * w_ref.shape[0]):
        own_q_ref[i] = jnp.concatenate(_paired_queries(q_ref[i]), axis=0) if packed else q_ref[i]
        for t in range(T):
            own_w_ref[i, t * H : (t + 1) * H] = _column(w_ref[i, t : t + 1])


def _column(row: jax.Array) -> jax.Array:
    """[1, n] -> fp32 [n, 128], each value repeated over its row."""
    n = row.shape[1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    held = jnp.where(i == j, jnp.broadcast_to(row.astype(jnp.float32), (n, n)), 0)
    return jnp.broadcast_to(jnp.sum(held, axis=1, keepdims=True), (n, LANES))


def _paired_queries(q: jax.Array) -> list[jax.Array]:
    """[n, 128] -> two of [n, 256], for the first and the second key of each row of `_paired_keys`."""
    channel, column = (jax.lax.broadcasted_iota(jnp.int32, (LANES, 2 * LANES), axis) for axis in (0, 1))
    half, lane = LANES // 2, column % LANES
    wanted = lane % half * 2 + column // LANES
    sides = [jnp.where((channel == wanted) & (lane // half == side), E2M1_UNIT, 0.0) for side in (0, 1)]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    move = lambda side: jax.lax.dot_general(
        q, side.astype(q.dtype), NN, precision=precision, preferred_element_type=jnp.float32
    )
    return [move(side).astype(q.dtype) for side in sides]


def _paired_keys(first: jax.Array, second: jax.Array, ragged: bool) -> jax.Array:
    """Twice uint8 [n, 128], rows of `Fp4Rows.data` and whatever follows -> bfloat16 [n, 256] over 2^14.

    A row holds the even channels of a key of `first`, those of the key of `second`, then the odd ones of both. Codes
    become floats as in expert_matmul.
    ragged: rows past the last may hold anything; a scale that is no number would spoil the key beside it.
    """
    half, lane = LANES // 2, jax.lax.broadcasted_iota(jnp.int32, (first.shape[0] // 4, LANES), 1)
    first, second = pltpu.bitcast(first, jnp.int32), pltpu.roll(pltpu.bitcast(second, jnp.int32), half, 1)
    codes, scales = jnp.where(lane < half, first, second), jnp.where(lane < half, second, first)
    even = ((codes & 0x08080808) << 4) | ((codes & 0x07070707) << 1)
    odd = (codes & jnp.int32(-0x7F7F7F80)) | (jax.lax.shift_right_logical(codes, 3) & 0x0E0E0E0E)
    group = lane % half // (SCALED // 2) + jnp.where(lane < half, half, 0)
    spread = pltpu.bitcast(jnp.take_along_axis(scales, group, axis=1), jnp.uint8)
    factors = pltpu.bitcast(pltpu.bitcast(spread.astype(jnp.uint16), jnp.int32) << 7, jnp.bfloat16)
    factors = jnp.minimum(factors, jnp.bfloat16(2.0**127)) if ragged else factors
    return jnp.concatenate(
        [pltpu.bitcast(x, jnp.float8_e5m2).astype(jnp.bfloat16) * factors for x in (even, odd)], axis=1
    )


def _sum_rows(parts: list[jax.Array]) -> jax.Array:
    """Eight [8, 128] -> one, whose row i is the sum of the rows of parts[i]; halves are folded onto each other."""
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
    for shift in (4, 2, 1):
        pairs = zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True)
        fold = lambda a, b, s: jnp.where(row & s == 0, a + pltpu.roll(a, ROWS - s, 0), b + pltpu.roll(b, s, 0))
        parts = [fold(a, b, shift) for a, b in pairs]
    return parts[0]


def _store_bits(scores_ref, visible, picked, out_ref, find: _Search):
    """Words of 32 chunks each, by or-ing whole registers; see `MaskBits`."""
    least, last = picked

    def store(group, carry):
        words = jnp.zeros((find.rows, LANES), jnp.int32)
        for b in range(min(WORD, find.chunks)):
            chunk = group * WORD + b
            scores = scores_ref[chunk]
            entry = chunk * LANES + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            pick = (scores > least) | ((scores == least) & (entry <= last))
            words |= jnp.where(pick & (entry < visible), jnp.int32(1 << b if b < 31 else HIDDEN), 0)
        out_ref[:, pl.ds(pl.multiple_of(group * LANES, LANES), LANES)] = words
        return carry

    jax.lax.fori_loop(0, out_ref.shape[1] // LANES, store, 0)


def _compact(picks_ref, table_ref, slots: int) -> jax.Array:
    """Ascending indices of what is picked, int32 [1, slots], -1 after the last.

    There is no scatter, so each slot looks for its entry: first for the row of 128 entries, by comparing with the
    running number of picks (one column per row), then, with that row's picks fetched by a product, for the lane.
    Picks ascend, so 128 slots look only into the squares where theirs lie.

    Args:
      picks_ref: 0/1 bf16 [squares, 128, 128], 128 entries to a row.
      table_ref: fp32 [squares, 2, 128] to work in.
    """
    upto = as_bf16(_lanes_upto())
    ones = jnp.ones((ROWS, LANES), jnp.bfloat16)
    ends = [jnp.float32(0)]
    for i in range(picks_ref.shape[0]):
        per_row = product(ones, picks_ref[i], NT)  # [8, 128], all rows alike
        running = ends[-1] + product(as_bf16(per_row), upto)
        table_ref[i, 0:1], table_ref[i, 1:2] = per_row[:1], running[:1]
        ends.append(running[0, LANES - 1])
    firsts = range(0, slots, LANES)
    found = [_find_rows(first, picks_ref, table_ref, ends) for first in firsts]  # before the rest, which then overlaps
    parts = []
    for first, (rows, left, lanes) in zip(firsts, found, strict=True):
        smaller = product(as_bf16(lanes), upto) <= left  # lanes before the slot's
        index = LANES * product(ones, as_bf16(rows), NT) + product(ones, as_bf16(smaller), NT)
        filled = first + jax.lax.broadcasted_iota(jnp.int32, index.shape, 1) < ends[-1].astype(jnp.int32)
        parts.append(jnp.where(filled, index.astype(jnp.int32), -1)[:1])
    return jnp.concatenate(parts, axis=1)


def _find_rows(first: int, picks_ref, table_ref, ends) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For slots first .. first + 127 of `_compact`: rows passed, a count to be summed over lanes, [128, 128]; which of
    the picks in its row the slot wants, [128, 1]; and that row's 0/1 picks, [128, 128]."""
    slot = (first + jax.lax.broadcasted_iota(jnp.int32, (LANES, 1), 0)).astype(jnp.float32)
    slot = jnp.broadcast_to(slot, (LANES, LANES))

    def look(i, state):
        rows, skipped, lanes = state
        per_row, running = table_ref[i, 0:1], table_ref[i, 1:2]
        passed = running <= slot
        here = (running - per_row <= slot) & (running > slot)
        skipped += jnp.where(passed, per_row, 0)
        return rows + passed.astype(jnp.float32), skipped, lanes + product(as_bf16(here), picks_ref[i])

    zero = jnp.zeros((LANES, LANES), jnp.float32)
    if picks_ref.shape[0] == 1:
        rows, skipped, lanes = look(0, (zero, zero, zero))
        return rows, slot - jnp.sum(skipped, axis=1, keepdims=True), lanes
    count = lambda tests: sum(test.astype(jnp.int32) for test in tests)
    low, high = count(end <= first for end in ends[1:]), count(start < first + LANES for start in ends[:-1])
    before = functools.reduce(jnp.maximum, [jnp.where(end <= first, end, 0.0) for end in ends])
    rows, skipped, lanes = jax.lax.fori_loop(low, high, look, (zero, zero, zero))
    return rows + low.astype(jnp.float32), slot - before - jnp.sum(skipped, axis=1, keepdims=True), lanes


def _compact_scratch(N: int) -> list:
    squares = math.ceil(N / LANES**2)
    return [pltpu.VMEM((squares, LANES, LANES), jnp.bfloat16), pltpu.VMEM((squares, 2, LANES), jnp.float32)]


def _lanes_upto() -> jax.Array:
    """True [128, 128] where the row is not past the lane: a product with it sums the lanes up to each."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    return row <= lane


def _decode_kernel(visible_ref, q_ref, w_ref, keys_ref, *rest, find: _Decode, config: Config, has_scale: bool):
    """One block of keys of one sequence; after the last of the tile's sequences, the picks of all of them."""
    scale_ref = rest[0] if has_scale else None
    out_ref, own_q_ref, own_w_ref, scores_ref, candidates_ref, above_ref, *work = rest[has_scale:]
    tile, sequence, block = (pl.program_id(axis) for axis in range(3))
    T, queries = find.tokens, find.tokens * config.sequences
    seen = [jnp.clip(visible_ref[tile * queries + i], 0, find.entries) for i in range(queries)]
    mine = [jnp.clip(visible_ref[tile * queries + sequence * T + t], 0, find.entries) for t in range(T)]
    slot, most, chunks = sequence * T, _most(seen), config.key_block // LANES
    used = pl.cdiv(_most(mine), config.key_block)
    written = pl.cdiv(most, config.key_block) if find.data_dependent else find.blocks

    @pl.when((sequence == 0) & (block == 0))
    def _begin():
        _prepare(q_ref, w_ref, own_q_ref, own_w_ref, keys_ref.dtype == jnp.uint8)

    @pl.when(block < used if find.data_dependent else True)
    def _score():
        own_q, own_w = own_q_ref.at[sequence], own_w_ref.at[sequence]
        _score_decode(own_q, own_w, keys_ref, scale_ref, mine, scores_ref, slot, block, config, find.ragged)

    if config.sequences > 1 and find.data_dependent:

        @pl.when((block >= used) & (block < written))
        def _skip():
            hidden = jnp.full((chunks, LANES), HIDDEN, jnp.int32)
            for t in range(T):
                scores_ref[pl.ds(block * chunks * QUERIES + slot + t, chunks, stride=QUERIES)] = hidden

    @pl.when((block == find.blocks - 1) & (sequence == config.sequences - 1))
    def _pick():
        groups = find.groups if find.groups <= UNROLLED else whole_groups(pl.cdiv(written * chunks, WORD))

        def hide(chunk, carry):
            scores_ref[pl.ds(pl.multiple_of(chunk * QUERIES, QUERIES), QUERIES)] = jnp.full(PLANE, HIDDEN, jnp.int32)
            return carry

        def turn(group, carry):
            turn_bits(scores_ref, group)
            return carry

        jax.lax.fori_loop(written * chunks, groups * WORD, hide, 0)
        jax.lax.fori_loop(0, groups, turn, 0)
        row = jax.lax.broadcasted_iota(jnp.int32, PLANE, 0)
        wanted = jnp.zeros(PLANE, jnp.int32)
        for i in range(queries):
            wanted = jnp.where(row == i, jnp.minimum(seen[i], find.top_k), wanted)
        search = Search(scores_ref, candidates_ref, above_ref, groups, find.groups, find.data_dependent)
        search.run(wanted.astype(jnp.float32), groups * GROUP)
        _store_indices(above_ref, out_ref, work, queries)


def _most(numbers):
    return functools.reduce(jnp.maximum, numbers)


def _store_indices(picked_ref, out_ref, work, queries: int):
    """A list of the bits of each query's picks."""
    groups, slots = picked_ref.shape[0], out_ref.shape[-1]
    if not work:
        words = [[picked_ref[g, i : i + 1] for g in range(groups)] for i in range(queries)]
        for i, listed in enumerate(list_bits(words, slots)):
            out_ref[i] = listed
        return
    picks_ref, table_ref = work

    def store(i, carry):
        for g in range(LANES // WORD * picks_ref.shape[0]):
            row = g % (LANES // WORD) * WORD
            bits = spread_bits(picked_ref[g, pl.ds(i, 1)]) if g < groups else jnp.zeros((WORD, LANES), jnp.int32)
            picks_ref[g * WORD // LANES, row : row + WORD] = as_bf16(bits)
        out_ref[i] = _compact(picks_ref, table_ref, slots)
        return carry

    jax.lax.fori_loop(0, queries, store, 0)


@dataclasses.dataclass(frozen=True)
class _Decode:
    """Sizes of a call in decode. blocks: of keys, in a sequence; groups: of 32 chunks of scores."""

    tokens: int
    entries: int
    blocks: int
    groups: int
    top_k: int
    data_dependent: bool
    ragged: bool


def _select_decode(q, weights, keys, visible, scale, top_k: int, chip: Chip, config: Config, interpret):
    """int32 [B, T, slots] ascending indices."""
    (B, T, H, D), N = q.shape, keys.shape[1]
    blocks, together = math.ceil(N / config.key_block), config.sequences
    groups = math.ceil(blocks * config.key_block / GROUP)
    groups = groups if groups <= UNROLLED else whole_groups(groups)
    find = _Decode(T, N, blocks, groups, top_k, config.data_dependent, N % config.key_block > 0)
    tile = lambda b, s, n, visible: (b, 0, 0)
    operands = [q.reshape(B, T * H, D), weights]
    specs = [pl.BlockSpec((together, *x.shape[1:]), tile) for x in operands]

    def key_at(b, s, n, visible):
        first = (b * together + s) * T
        most = _most([jnp.clip(visible[first + t], 0, N) for t in range(T)])
        last = jnp.maximum(pl.cdiv(most, config.key_block) - 1, 0) if config.data_dependent else blocks - 1
        return b * together + s, jnp.minimum(n, last), 0

    operands.append(keys)
    specs.append(pl.BlockSpec((None, config.key_block, LANES), key_at))
    if scale is not None:
        operands.append(jnp.pad(scale.astype(jnp.float32), ((0, 0), (0, -N % LANES))).reshape(B, -1, LANES))
        specs.append(pl.BlockSpec((None, config.key_block // LANES, LANES), key_at))
    shape, width = (groups * WORD * QUERIES, LANES), math.ceil(top_k / LANES) * LANES
    _check_vmem(shape, chip)
    words, pairs = pltpu.VMEM((groups, *PLANE), jnp.int32), 2 if keys.dtype == jnp.uint8 else 1
    picked = pl.pallas_call(
        functools.partial(_decode_kernel, find=find, config=config, has_scale=scale is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B // together, together, blocks),
            in_specs=specs,
            out_specs=pl.BlockSpec((together * T, 1, width), tile),
            scratch_shapes=[
                pltpu.VMEM((together, pairs * T * H, pairs * D), q.dtype),
                pltpu.VMEM((together, T * H, LANES), jnp.float32),
                pltpu.VMEM(shape, jnp.int32),
                words,
                words,
                *(_compact_scratch(N) if groups > UNROLLED else []),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B * T, 1, width), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=chip.vmem_bytes * 3 // 4,
        ),
        interpret=interpret,
        name="index_topk_decode",
    )(visible.reshape(-1).astype(jnp.int32), *operands)
    return picked.reshape(B, T, width)


def _prefill_kernel(blocks_ref, q_ref, w_ref, visible_ref, keys_ref, *rest, find: _Search, config: Config, blocks: int):
    """One block of keys, and after the last the picks of the tile's queries."""
    scale_ref = rest[0] if find.has_scale else None
    out_ref, scores_ref = rest[find.has_scale :]
    b, tile, block = (pl.program_id(axis) for axis in range(3))
    used = blocks_ref[b * pl.num_programs(1) + tile]

    @pl.when(block < used if find.data_dependent else True)
    def _score():
        _score_prefill(q_ref, w_ref, keys_ref, scale_ref, visible_ref[...], scores_ref, block, config)

    @pl.when(block == blocks - 1)
    def _pick():
        seen = jnp.broadcast_to(visible_ref[...], find.plane)
        written = (used if find.data_dependent else blocks) * (config.key_block // LANES)
        steps = pl.cdiv(written, COUNT_CHUNKS)

        def hide(chunk, carry):
            scores_ref[chunk] = jnp.full(find.plane, HIDDEN, jnp.int32)
            return carry

        jax.lax.fori_loop(written, steps * COUNT_CHUNKS, hide, 0)
        _store_bits(scores_ref, seen, _search(scores_ref, seen, steps, find), out_ref, find)


def _select_prefill(q, weights, keys, visible, scale, top_k: int, chip: Chip, config: Config, interpret):
    """int32 [B, T, words]."""
    (B, T, H, D), N, rows = q.shape, keys.shape[1], config.query_tile
    blocks, tiles = math.ceil(N / config.key_block), math.ceil(T / rows)
    entries = blocks * config.key_block
    chunks = entries // LANES if entries < GROUP else math.ceil(entries / GROUP) * WORD
    find = _Search(chunks, rows, top_k, config.data_dependent, scale is not None)
    seen = jnp.pad(visible, ((0, 0), (0, tiles * rows - T)))
    used = jnp.ceil(jnp.max(seen.reshape(B, tiles, rows), axis=-1) / config.key_block).astype(jnp.int32)
    used = used if config.data_dependent else jnp.full_like(used, blocks)
    width = words_for(N)
    at = lambda b, t, n, used: (b, t, 0)
    operands = [q.reshape(B, T, H * D), weights.astype(jnp.float32), seen[..., None]]
    specs = [pl.BlockSpec((None, rows, x.shape[-1]), at) for x in operands]
    key_at = lambda b, t, n, used: (b, jnp.minimum(n, jnp.maximum(used[b * tiles + t] - 1, 0)), 0)
    operands.append(keys)
    specs.append(pl.BlockSpec((None, config.key_block, keys.shape[2]), key_at))
    if scale is not None:
        operands.append(scale.astype(jnp.float32)[:, None])
        specs.append(pl.BlockSpec((None, 1, config.key_block), lambda *at: (at[0], 0, key_at(*at)[1])))
    shape = (chunks, *find.plane)
    _check_vmem(shape, chip)
    return pl.pallas_call(
        functools.partial(_prefill_kernel, find=find, config=config, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, tiles, blocks),
            in_specs=specs,
            out_specs=pl.BlockSpec((None, rows, width), at),
            scratch_shapes=[pltpu.VMEM(shape, jnp.int32)],
        ),
        out_shape=jax.ShapeDtypeStruct((B, T, width), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=chip.vmem_bytes * 3 // 4
        ),
        interpret=interpret,
        name="index_topk_prefill",
    )(used.reshape(-1), *operands)


def _check_vmem(shape: tuple[int, ...], chip: Chip) -> None:
    size = 4 * math.prod(shape)
    if size > chip.vmem_bytes * 5 // 8:
        raise ValueError(
            f"index_topk_tpu: scores of one tile need {size} bytes of the {chip.vmem_bytes} of VMEM on {chip.name}; "
            f"use a smaller query_tile or the xla op"
        )


def indices_from_bits_tpu(bits: MaskBits, *, top_k: int, chip: Chip, interpret: Any = False) -> jax.Array:
    """MaskBits of [B, T, N] with at most `top_k` bits a query -> ascending indices int32 [B, T, top_k], then -1."""
    require(chip, "indices_from_bits_tpu", platform="tpu")
    B, T, words = bits.words.shape
    groups = words // LANES
    slots = math.ceil(top_k / LANES) * LANES

    def kernel(words_ref, out_ref, picks_ref, table_ref):
        def store(t, carry):
            bit = jax.lax.broadcasted_iota(jnp.int32, (WORD, LANES), 0)
            for g in range(LANES // WORD * picks_ref.shape[0]):
                row = g % (LANES // WORD) * WORD
                picked = (words_ref[t, g : g + 1] >> bit) & 1 if g < groups else jnp.zeros((WORD, LANES), jnp.int32)
                picks_ref[g * WORD // LANES, row : row + WORD] = as_bf16(picked)
            out_ref[t] = _compact(picks_ref, table_ref, slots)
            return carry

        jax.lax.fori_loop(0, ROWS, store, 0)

    out = pl.pallas_call(
        kernel,
        grid=(math.ceil(B * T / ROWS),),
        in_specs=[pl.BlockSpec((ROWS, groups, LANES), lambda i: (i, 0, 0))],
        out_specs=pl.BlockSpec((ROWS, 1, slots), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((B * T, 1, slots), jnp.int32),
        scratch_shapes=_compact_scratch(bits.size),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="indices_from_bits",
    )(bits.words.reshape(B * T, groups, LANES))
    return out.reshape(B, T, slots)[..., :top_k]
