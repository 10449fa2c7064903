"""Index scores and their exact top-k on TPU, in one pass over the keys.

Blocks of keys stream by; their scores stay in VMEM as integers of the same order, [queries, N] for a tile of queries.
After the last block a search by counting finds the k-th largest of every query, then, if some entries tie with it, the
index up to which those are picked; no score and no mask ever goes to HBM.

Scores lie as [chunk, group, row, lane]. In prefill a chunk is 128 entries and its rows are the queries of the tile; in
decode (up to 8 queries) a group is a query and a chunk is 1024 entries, 128 to a row, so that each fills registers.
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
from pallas_kernels.index_topk.tuning import DECODE_TOKENS, SEARCHED, Config, default_config
from pallas_kernels.mask_bits import GROUP, LANES, WORD, MaskBits, words_for
from pallas_kernels.sparse_mla.reference import Indices

ROWS = 8  # sublanes of a register
COUNT_CHUNKS = 8  # chunks of one counting step in prefill
COUNT_REGISTERS = 32  # scores of one counting step in decode; at most 32 chunks
PARTIAL_COUNTS = 8  # registers counted into, in decode
SEARCH_BITS = 2  # of a score found by one step of the search, in decode
PRODUCT_ROWS = 512  # heads times queries of one product in prefill
PRODUCTS = 8  # of one query and 1024 keys, worked on together in decode
E2M1_UNIT = 2.0**14  # an e2m1 value over that of its code placed as e5m2
HIDDEN = -(2**31)  # below the integer of every score
NT = (((1,), (1,)), ((), ()))


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
    if isinstance(keys, Fp4Rows):
        # In the order and the unit of `_wide_keys`.
        q, keys = jnp.concatenate([q[..., 0::2], q[..., 1::2]], axis=-1) * E2M1_UNIT, keys.data
    (_, T, _, _), N = q.shape, keys.shape[1]
    config = config or default_config(T, N, chip, q.shape[0])
    top_k = min(top_k, N)
    as_bits = T > DECODE_TOKENS if as_bits is None else as_bits
    decode = T <= DECODE_TOKENS and not as_bits
    if not decode and T <= DECODE_TOKENS:
        config = dataclasses.replace(default_config(DECODE_TOKENS + 1, N, chip), data_dependent=config.data_dependent)
    visible = jnp.clip(visible, 0, N).astype(jnp.int32)
    picked = _select(q, weights, keys, visible, scale, top_k, chip, config, decode, interpret)
    if decode:
        return Indices(picked[..., :top_k])
    bits = MaskBits(picked, N)
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
    """How scores lie in VMEM ([chunks, groups, rows, 128]) and are counted."""

    decode: bool
    chunks: int
    groups: int
    rows: int
    step: int  # chunks of one counting step
    top_k: int
    data_dependent: bool
    has_scale: bool

    @property
    def plane(self) -> tuple[int, int, int]:
        return self.groups, self.rows, LANES

    @property
    def bits(self) -> int:
        """Of a score, found in one step. More of them cost more counting in all, but fewer waits."""
        return SEARCH_BITS if self.decode and self.groups <= SEARCHED else 1

    @property
    def partial(self) -> int:
        """Chunks counted apart, so that additions need not wait for each other."""
        counts = self.groups * (2**self.bits - 1)
        return min(self.step, max(1, PARTIAL_COUNTS // counts)) if self.decode else 1

    @property
    def chunk_entries(self) -> int:
        return ROWS * LANES if self.decode else LANES

    def total(self, x: jax.Array) -> jax.Array:
        """Counts [groups, rows, 128] fp32 -> per query, repeated over the lanes (and rows, in decode) of its scores."""
        x = jnp.sum(x, axis=-1, keepdims=True)
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True) if self.decode else x, self.plane)

    def entries(self, chunk) -> jax.Array:
        """The entries of `step` chunks from `chunk` on: int32, broadcastable to their scores."""
        shape = (self.step, 1, self.rows, LANES)
        index = chunk * self.chunk_entries + jax.lax.broadcasted_iota(jnp.int32, shape, 3)
        index += self.chunk_entries * jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return index + LANES * jax.lax.broadcasted_iota(jnp.int32, shape, 2) if self.decode else index

    def count(self, scores_ref, steps, thresholds: list[jax.Array]) -> list[jax.Array]:
        """How many scores of each query reach each threshold, as fp32 (exact: fewer than 2^24)."""

        def add(i, found):
            scores = scores_ref[pl.ds(i * self.step, self.step)]
            reached = [(scores >= t).astype(jnp.float32).reshape(-1, self.partial, *self.plane) for t in thresholds]
            return [f + jnp.sum(r, axis=0) for f, r in zip(found, reached, strict=True)]

        zeros = [jnp.zeros((self.partial, *self.plane), jnp.float32) for _ in thresholds]
        return [self.total(jnp.sum(found, axis=0)) for found in jax.lax.fori_loop(0, steps, add, zeros)]

    def repeat(self, times: int, going, step, state):
        """`step(state)` while `going(state)`, at most `times` times; exactly so often without data_dependent."""
        if not self.data_dependent:
            return jax.lax.fori_loop(0, times, lambda _, s: step(s), state)
        more = lambda s: (s[0] < times) & (jnp.max(going(s[1]).astype(jnp.float32)) > 0)
        return jax.lax.while_loop(more, lambda s: (s[0] + 1, step(s[1])), (0, state))[1]


def _middle(low, high):
    return (low & high) + ((low ^ high) >> 1)  # their sum could overflow


def _search(scores_ref, visible, steps, find: _Search):
    """The pick of each query as (least score, last entry): all scores above, and those equal up to that entry.

    Every number of a query is repeated over a plane of its scores: broadcasting it in the inner loop costs more than
    the counting. A step of the search takes as long as a count takes to come back, so it counts at several thresholds.
    """
    want = jnp.minimum(visible, find.top_k).astype(jnp.float32)

    def narrow(state):
        low, high, at_low, at_high = state
        between = [low, high]
        for _ in range(find.bits):
            middles = [_middle(a, b) for a, b in itertools.pairwise(between)]
            between = [*itertools.chain(*zip(between, middles, strict=False)), high]
        counted = list(zip(between[1:-1], find.count(scores_ref, steps, between[1:-1]), strict=True))
        for middle, found in counted:
            low, at_low = jnp.where(found >= want, middle, low), jnp.where(found >= want, found, at_low)
        for middle, found in reversed(counted):
            high, at_high = jnp.where(found < want, middle, high), jnp.where(found < want, found, at_high)
        return low, high, at_low, at_high

    low = jnp.full(visible.shape, HIDDEN + 1, jnp.int32)
    high = jnp.full(visible.shape, 2**31 - 1, jnp.int32)
    state = low, high, visible.astype(jnp.float32), jnp.zeros(visible.shape, jnp.float32)
    going = lambda s: (s[2] != want) & (s[0] + 1 != s[1])
    least, _, at_least, above = find.repeat(-(-32 // find.bits), going, narrow, state)
    last = lambda: _last_of_ties(scores_ref, least, want - above, steps, find)
    if not find.data_dependent:
        return least, last()
    every = lambda: jnp.full(visible.shape, find.chunks * find.chunk_entries, jnp.int32)
    return least, jax.lax.cond(jnp.max(at_least - want) > 0, last, every)


def _last_of_ties(scores_ref, least, wanted, steps, find: _Search) -> jax.Array:
    """The entry of the wanted-th score that equals `least`: first the chunk that holds it, then where in it."""

    def look(i, state):
        equal = (scores_ref[pl.ds(i * find.step, find.step)] == least).astype(jnp.float32)
        seen, chunk, left, held = state
        for j in range(find.step):
            upto = seen + find.total(equal[j])
            here = (seen < wanted) & (upto >= wanted)
            chunk = jnp.where(here, i * find.step + j, chunk)
            left, held = jnp.where(here, wanted - seen, left), jnp.where(here, equal[j], held)
            seen = upto
        return seen, chunk, left, held

    zero = jnp.zeros(find.plane, jnp.float32)
    _, chunk, left, held = jax.lax.fori_loop(0, steps, look, (zero, zero.astype(jnp.int32), zero, zero))
    upto = _product(_bf16(held.reshape(-1, LANES)), _bf16(_lanes_upto())).reshape(find.plane)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, find.plane, axis) for axis in (1, 2))
    if find.decode:  # the rows of a chunk follow each other
        ends = jnp.broadcast_to(upto[..., LANES - 1 :], find.plane)
        upto += sum(jnp.where(row > r, ends[:, r : r + 1], 0.0) for r in range(ROWS - 1))
        lane += LANES * row
    place = jnp.where((held > 0) & (upto == left), lane, 0).astype(jnp.float32)
    return chunk * find.chunk_entries + find.total(place).astype(jnp.int32)


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
            scores_ref[chunk, 0] = total[:, j * LANES : (j + 1) * LANES]
        return carry

    jax.lax.fori_loop(0, config.key_block // config.columns, score, 0)


def _score_decode(q_ref, w_ref, keys_ref, scale_ref, visible, scores_ref, block, config: Config):
    """q [T * H, 128], w [T * H, 1], keys [key_block, 128], scale [key_block / 128, 128] -> chunks of `scores_ref`."""
    T = scores_ref.shape[1]
    q, H = q_ref[...], q_ref.shape[0] // T
    w = jnp.broadcast_to(w_ref[...], (T * H, LANES))
    width = ROWS * LANES

    def score(chunk):
        parts: list[list[jax.Array]] = [[] for _ in range(T)]
        for j in range(0, width, config.columns):
            keys = keys_ref[pl.ds(pl.multiple_of(chunk * width + j, LANES), config.columns)]
            dots = jnp.maximum(_dots(q, _wide_keys(keys)), 0)
            for t, lane in itertools.product(range(T), range(0, config.columns, LANES)):
                heads = slice(t * H, (t + 1) * H)
                weighted = dots[heads, lane : lane + LANES] * w[heads]
                parts[t].append(jnp.sum(weighted.reshape(-1, ROWS, LANES), axis=0))
        rows = jnp.stack([_sum_rows(p) for p in parts])  # [T, 8, 128]
        if scale_ref is not None:
            rows *= scale_ref[pl.ds(pl.multiple_of(chunk * ROWS, ROWS), ROWS)]
        chunk += block * (config.key_block // width)
        entry = chunk * width + LANES * jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
        entry += jax.lax.broadcasted_iota(jnp.int32, rows.shape, 2)
        scores_ref[chunk] = jnp.where(entry < visible, _ordered(rows), HIDDEN)

    def several(i, carry):
        for j in range(together):  # so that one product overlaps the next
            score(i * together + j)
        return carry

    together = min(config.key_block // width, max(1, PRODUCTS // T))
    jax.lax.fori_loop(0, config.key_block // width // together, several, 0)


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
            scores = scores_ref[chunk, 0]
            entry = chunk * LANES + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            pick = (scores > least[0]) | ((scores == least[0]) & (entry <= last[0]))
            words |= jnp.where(pick & (entry < visible[0]), jnp.int32(1 << b if b < 31 else HIDDEN), 0)
        out_ref[:, pl.ds(pl.multiple_of(group * LANES, LANES), LANES)] = words
        return carry

    jax.lax.fori_loop(0, out_ref.shape[1] // LANES, store, 0)


def _store_indices(scores_ref, visible, picked, out_ref, picks_ref, table_ref, find: _Search):
    """Replace the scores by 0/1 picks, then make a list of each query's."""
    least, last = picked

    def mark(i, carry):
        scores, entry = scores_ref[pl.ds(i * find.step, find.step)], find.entries(i * find.step)
        pick = (scores > least) | ((scores == least) & (entry <= last))
        scores_ref[pl.ds(i * find.step, find.step)] = (pick & (entry < visible)).astype(jnp.int32)
        return carry

    def store(t, carry):
        for i in range(picks_ref.shape[0]):
            chunk = i * (LANES // ROWS)
            picks_ref[i] = _bf16(scores_ref[chunk : chunk + LANES // ROWS, t].reshape(LANES, LANES))
        out_ref[t] = _compact(picks_ref, table_ref, out_ref.shape[-1])
        return carry

    jax.lax.fori_loop(0, find.chunks // find.step, mark, 0)
    jax.lax.fori_loop(0, find.groups, store, 0)


def _compact(picks_ref, table_ref, slots: int) -> jax.Array:
    """Ascending indices of what is picked, int32 [1, slots], -1 after the last.

    There is no scatter, so each slot looks for its entry: first for the row of 128 entries, by comparing with the
    running number of picks (one column per row), then, with that row's picks fetched by a product, for the lane.
    Picks ascend, so 128 slots look only into the squares where theirs lie.

    Args:
      picks_ref: 0/1 bf16 [squares, 128, 128], 128 entries to a row.
      table_ref: fp32 [squares, 2, 128] to work in.
    """
    upto = _bf16(_lanes_upto())
    ones = jnp.ones((ROWS, LANES), jnp.bfloat16)
    ends = [jnp.float32(0)]
    for i in range(picks_ref.shape[0]):
        per_row = _product(ones, picks_ref[i], NT)  # [8, 128], all rows alike
        running = ends[-1] + _product(_bf16(per_row), upto)
        table_ref[i, 0:1], table_ref[i, 1:2] = per_row[:1], running[:1]
        ends.append(running[0, LANES - 1])
    firsts = range(0, slots, LANES)
    found = [_find_rows(first, picks_ref, table_ref, ends) for first in firsts]  # before the rest, which then overlaps
    parts = []
    for first, (rows, left, lanes) in zip(firsts, found, strict=True):
        smaller = _product(_bf16(lanes), upto) <= left  # lanes before the slot's
        index = LANES * _product(ones, _bf16(rows), NT) + _product(ones, _bf16(smaller), NT)
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
        return rows + passed.astype(jnp.float32), skipped, lanes + _product(_bf16(here), picks_ref[i])

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


def _bf16(x) -> jax.Array:
    """Truth values and counts up to 256 are exact in bf16; a product of them sums in fp32."""
    return x.astype(jnp.float32).astype(jnp.bfloat16)


def _product(a, b, dimensions=(((1,), (0,)), ((), ()))) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _kernel(
    blocks_ref, q_ref, w_ref, visible_ref, keys_ref, *rest, find: _Search, config: Config, tiles: int, blocks: int
):
    """One block of keys; tiles: of queries in prefill, sequences searched together in decode."""
    scale_ref = rest[0] if find.has_scale else None
    out_ref, scores_ref, *work = rest[find.has_scale :]
    b, tile, block = (pl.program_id(axis) for axis in range(3))
    used = blocks_ref[b * tiles + tile]
    most = used
    if find.decode:
        most = functools.reduce(jnp.maximum, [blocks_ref[b * tiles + i] for i in range(tiles)])
        mine = pl.ds(tile * (find.groups // tiles), find.groups // tiles)
        visible, own_scores, score = visible_ref[mine], scores_ref.at[:, mine], _score_decode
    else:
        visible, own_scores, score = visible_ref[...], scores_ref, _score_prefill

    @pl.when(block < used if find.data_dependent else True)
    def _score():
        score(q_ref, w_ref, keys_ref, scale_ref, visible, own_scores, block, config)

    chunks = config.key_block // find.chunk_entries

    if find.decode and tiles > 1 and find.data_dependent:

        @pl.when((block >= used) & (block < most))
        def _skip():
            shape = (chunks, *own_scores.shape[1:])
            own_scores[pl.ds(block * chunks, chunks)] = jnp.full(shape, HIDDEN, jnp.int32)

    @pl.when((block == pl.num_programs(2) - 1) & (tile == tiles - 1 if find.decode else True))
    def _pick():
        every = visible_ref[...]
        seen = jnp.broadcast_to(every if find.decode else every[None], find.plane)
        written = (most if find.data_dependent else blocks) * chunks
        steps = pl.cdiv(written, find.step)

        def hide(chunk, carry):
            scores_ref[chunk] = jnp.full(find.plane, HIDDEN, jnp.int32)
            return carry

        jax.lax.fori_loop(written, steps * find.step, hide, 0)
        picked = _search(scores_ref, seen, steps, find)
        if find.decode:
            picks_ref, table_ref = work
            _store_indices(scores_ref, seen, picked, out_ref, picks_ref, table_ref, find)
        else:
            _store_bits(scores_ref, seen, picked, out_ref, find)


def _select(q, weights, keys, visible, scale, top_k: int, chip: Chip, config: Config, decode: bool, interpret):
    """int32 [B, T, slots] ascending indices in decode, else [B, T, words]."""
    (B, T, H, D), N = q.shape, keys.shape[1]
    blocks = math.ceil(N / config.key_block)
    rows = T if decode else config.query_tile
    tiles = math.ceil(T / rows)
    find = _layout(T, N, top_k, config, decode, scale is not None)
    used = jnp.max(jnp.pad(visible, ((0, 0), (0, tiles * rows - T))).reshape(B, tiles, rows), axis=-1)
    used = jnp.ceil(used / config.key_block).astype(jnp.int32) if config.data_dependent else jnp.full_like(used, blocks)
    if decode:  # sequences take the place of tiles of queries
        tiles = config.sequences
        width = math.ceil(top_k / LANES) * LANES
        searched = lambda b, t, n, used: (b, 0, 0)
        own = lambda b, t, n, used: (b * tiles + t, 0, 0)
        operands = [q.reshape(B, T * H, D), weights.astype(jnp.float32).reshape(B, T * H, 1)]
        specs = [pl.BlockSpec((None, *x.shape[1:]), own) for x in operands]
        operands.append(visible.reshape(B * T, 1, 1))
        specs.append(pl.BlockSpec((tiles * T, 1, 1), searched))
        out_shape, out_spec = (B * T, 1, width), pl.BlockSpec((tiles * T, 1, width), searched)
        key_row = lambda b, t: b * tiles + t
    else:
        width = words_for(N)
        at = lambda b, t, n, used: (b, t, 0)
        seen = jnp.pad(visible, ((0, 0), (0, tiles * rows - T)))[..., None]
        operands = [q.reshape(B, T, H * D), weights.astype(jnp.float32), seen]
        specs = [pl.BlockSpec((None, rows, x.shape[-1]), at) for x in operands]
        out_shape, out_spec = (B, T, width), pl.BlockSpec((None, rows, width), at)
        key_row = lambda b, t: b
    key_at = lambda b, t, n, used: (key_row(b, t), jnp.minimum(n, jnp.maximum(used[b * tiles + t] - 1, 0)), 0)
    operands.append(keys)
    specs.append(pl.BlockSpec((None, config.key_block, keys.shape[2]), key_at))
    if scale is not None:
        scale = scale.astype(jnp.float32)
        if decode:
            operands.append(jnp.pad(scale, ((0, 0), (0, -N % LANES))).reshape(B, -1, LANES))
            specs.append(pl.BlockSpec((None, config.key_block // LANES, LANES), key_at))
        else:
            operands.append(scale[:, None])
            specs.append(pl.BlockSpec((None, 1, config.key_block), lambda *at: (at[0], 0, key_at(*at)[1])))
    shape = (find.chunks, *find.plane)
    _check_vmem(shape, chip)
    picked = pl.pallas_call(
        functools.partial(_kernel, find=find, config=config, tiles=tiles, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B // tiles, tiles, blocks) if decode else (B, tiles, blocks),
            in_specs=specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(shape, jnp.int32), *(_compact_scratch(N) if decode else [])],
        ),
        out_shape=jax.ShapeDtypeStruct(out_shape, jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if decode else "parallel", "arbitrary"),
            vmem_limit_bytes=chip.vmem_bytes * 3 // 4,
        ),
        interpret=interpret,
        name="index_topk_decode" if decode else "index_topk_prefill",
    )(used.reshape(-1), *operands)
    return picked.reshape(B, T, width)


def _layout(T: int, N: int, top_k: int, config: Config, decode: bool, has_scale: bool) -> _Search:
    """Room for whole blocks of keys, and for what `_store_indices` and `_store_bits` take at a time."""
    entries = config.key_block * math.ceil(N / config.key_block)
    if decode:
        groups = T * config.sequences
        step = max(1, COUNT_REGISTERS // (1 << (groups - 1).bit_length()))
        chunks = math.ceil(entries / (GROUP * ROWS)) * WORD
        return _Search(True, chunks, groups, ROWS, step, top_k, config.data_dependent, has_scale)
    chunks = entries // LANES
    chunks = chunks if chunks < WORD else math.ceil(entries / GROUP) * WORD
    return _Search(False, chunks, 1, config.query_tile, COUNT_CHUNKS, top_k, config.data_dependent, has_scale)


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
                picks_ref[g * WORD // LANES, row : row + WORD] = _bf16(picked)
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
