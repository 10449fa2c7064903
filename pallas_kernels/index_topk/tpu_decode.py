"""Index scores and top-k of up to 8 queries a sequence on TPU: a chunk has a row for each query of a few sequences.

`tpu_select` finds the picks, of all of a tile's sequences together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip
from pallas_kernels.index_rows import GROUP as SCALED
from pallas_kernels.index_topk.tpu_lists import compact, compact_scratch
from pallas_kernels.index_topk.tpu_scores import E2M1_UNIT, HIDDEN, ROWS, check_vmem, key_dots, ordered
from pallas_kernels.index_topk.tpu_select import (
    NN,
    PLANE,
    QUERIES,
    UNROLLED,
    Search,
    as_bf16,
    list_bits,
    spread_bits,
    turn_bits,
    whole_groups,
)
from pallas_kernels.index_topk.tuning import Config
from pallas_kernels.mask_bits import GROUP, LANES, WORD

PRODUCTS = 8  # of one query and 1024 keys, worked on together


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
            dots = jnp.maximum(key_dots(q, _paired_keys(rows[0], rows[1], ragged) if packed else rows[0]), 0)
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
            total = jnp.where(entry < seen[t], ordered(total), HIDDEN)
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
        out_ref[i] = compact(picks_ref, table_ref, slots)
        return carry

    jax.lax.fori_loop(0, queries, store, 0)


def select_decode(q, weights, keys, visible, scale, top_k: int, chip: Chip, config: Config, interpret):
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
    check_vmem(shape, chip)
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
                *(compact_scratch(N) if groups > UNROLLED else []),
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
