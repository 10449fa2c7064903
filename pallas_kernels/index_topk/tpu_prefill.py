"""Index scores and top-k of many queries on TPU: a chunk is 128 entries, its rows are the queries of a tile.

A search by counting finds the k-th largest of every query, then, if some entries tie with it, the index up to which
those are picked.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip
from pallas_kernels.index_rows import GROUP as SCALED
from pallas_kernels.index_topk.tpu_lists import lanes_upto
from pallas_kernels.index_topk.tpu_scores import HIDDEN, check_vmem, key_dots, ordered
from pallas_kernels.index_topk.tpu_select import as_bf16, product
from pallas_kernels.index_topk.tuning import Config
from pallas_kernels.mask_bits import GROUP, LANES, WORD, words_for

COUNT_CHUNKS = 8  # chunks of one counting step
PRODUCT_ROWS = 512  # heads times queries of one product


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
    upto = product(as_bf16(held), as_bf16(lanes_upto()))
    lane = jax.lax.broadcasted_iota(jnp.int32, find.plane, 1)
    place = jnp.where((held > 0) & (upto == left), lane, 0).astype(jnp.float32)
    return chunk * LANES + find.total(place).astype(jnp.int32)


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
            dots = jnp.maximum(key_dots(rows, keys), 0)
            for h in heads:
                total += dots[(h - g) * queries : (h - g + 1) * queries] * w_ref[:, h : h + 1]
        if scale_ref is not None:
            total *= scale_ref[:, pl.ds(first, config.columns)]
        entry = block * config.key_block + first + jax.lax.broadcasted_iota(jnp.int32, total.shape, 1)
        total = jnp.where(entry < visible, ordered(total), HIDDEN)
        for j in range(config.columns // LANES):
            chunk = (block * config.key_block + first) // LANES + j
            scores_ref[chunk] = total[:, j * LANES : (j + 1) * LANES]
        return carry

    jax.lax.fori_loop(0, config.key_block // config.columns, score, 0)


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


def select_prefill(q, weights, keys, visible, scale, top_k: int, chip: Chip, config: Config, interpret):
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
    check_vmem(shape, chip)
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
