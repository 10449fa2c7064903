"""Lists of what bits pick, for TPU: where there is no scatter, each slot looks for its entry."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.index_topk.tpu_scores import ROWS
from pallas_kernels.index_topk.tpu_select import NT, as_bf16, product
from pallas_kernels.mask_bits import LANES, WORD, MaskBits


def compact(picks_ref, table_ref, slots: int) -> jax.Array:
    """Ascending indices of what is picked, int32 [1, slots], -1 after the last.

    There is no scatter, so each slot looks for its entry: first for the row of 128 entries, by comparing with the
    running number of picks (one column per row), then, with that row's picks fetched by a product, for the lane.
    Picks ascend, so 128 slots look only into the squares where theirs lie.

    Args:
      picks_ref: 0/1 bf16 [squares, 128, 128], 128 entries to a row.
      table_ref: fp32 [squares, 2, 128] to work in.
    """
    upto = as_bf16(lanes_upto())
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
    """For slots first .. first + 127 of `compact`: rows passed, a count to be summed over lanes, [128, 128]; which of
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


def compact_scratch(N: int) -> list:
    squares = math.ceil(N / LANES**2)
    return [pltpu.VMEM((squares, LANES, LANES), jnp.bfloat16), pltpu.VMEM((squares, 2, LANES), jnp.float32)]


def lanes_upto() -> jax.Array:
    """True [128, 128] where the row is not past the lane: a product with it sums the lanes up to each."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    return row <= lane


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
            out_ref[t] = compact(picks_ref, table_ref, slots)
            return carry

        jax.lax.fori_loop(0, ROWS, store, 0)

    out = pl.pallas_call(
        kernel,
        grid=(math.ceil(B * T / ROWS),),
        in_specs=[pl.BlockSpec((ROWS, groups, LANES), lambda i: (i, 0, 0))],
        out_specs=pl.BlockSpec((ROWS, 1, slots), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((B * T, 1, slots), jnp.int32),
        scratch_shapes=compact_scratch(bits.size),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="indices_from_bits",
    )(bits.words.reshape(B * T, groups, LANES))
    return out.reshape(B, T, slots)[..., :top_k]
