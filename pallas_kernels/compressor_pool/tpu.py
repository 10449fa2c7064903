"""Pooling on TPU: the rings as they lie, in one program where XLA gathers, cuts and joins in thirty.

Slots stay where they are, and a mask says which of them count: a softmax does not ask for their order. With overlap a
slot counts with one half of its channels, so both windows share one tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.compressor_pool.reference import check_shapes

LANES = 128
GROUP = 8  # sequences of a block, at most, whose latencies overlap
BLOCK_BYTES = 1 << 19  # of a ring's block, about


def _is_complete(start: jax.Array, end: jax.Array, ratio: int) -> jax.Array:
    return lax.div(start, ratio) < lax.div(end, ratio)


def _any_complete(group, size: int, start_ref, end_ref, ratio: int) -> jax.Array:
    """Whether a sequence of the `group`th block completes an entry."""
    each = [_is_complete(start_ref[b], end_ref[b], ratio) for b in (group * size + g for g in range(size))]
    return functools.reduce(jnp.logical_or, each)


def _masks(start: jax.Array, end: jax.Array, slots: int, ratio: int) -> tuple[jax.Array, jax.Array]:
    """bool [R, 128]: the slots of the own window, and of the one before."""
    newest, first = end - 1, lax.div(start, ratio) * ratio
    age = lax.rem(newest, slots) - lax.broadcasted_iota(jnp.int32, (slots, LANES), 0)
    position = newest - jnp.where(age < 0, age + slots, age)
    is_own = (position >= first) & (position < first + ratio)
    return is_own, (position >= jnp.maximum(first - ratio, 0)) & (position < first)


def _kernel(start_ref, end_ref, kv_ref, gate_ref, out_ref, pooled_ref, *, ratio: int, overlap: bool):
    (size, slots), D, group = kv_ref.shape[:2], out_ref.shape[1], pl.program_id(0)

    def pool(g: int):
        b = group * size + g
        start, end = start_ref[b], end_ref[b]
        is_own, is_before = _masks(start, end, slots, ratio)

        def counted(ref, lane: int, other: float) -> jax.Array:
            before = jnp.where(is_before, ref[g, :, lane : lane + LANES], other) if overlap else other
            own = lane + D if overlap else lane
            return jnp.where(is_own, ref[g, :, own : own + LANES], before)

        for lane in range(0, D, LANES):
            gates, rows = counted(gate_ref, lane, -jnp.inf), counted(kv_ref, lane, 0.0)
            weights = jnp.exp(gates - jnp.max(gates, axis=0, keepdims=True))
            sums = [jnp.sum(x, axis=0, keepdims=True) for x in (weights * rows, weights)]
            pooled = jnp.where(_is_complete(start, end, ratio), sums[0] / sums[1], 0.0)
            pooled_ref[lane // LANES, pl.ds(b, 1)] = pooled

    @pl.when(group == 0)
    def _():
        pooled_ref[...] = jnp.zeros_like(pooled_ref)

    @pl.when(_any_complete(group, size, start_ref, end_ref, ratio))
    def _():
        for g in range(size):
            pool(g)

    @pl.when(group == pl.num_programs(0) - 1)
    def _():
        for i in range(D // LANES):
            out_ref[:, i * LANES : (i + 1) * LANES] = pooled_ref[i].astype(out_ref.dtype)


def pool_window_tpu(
    kv: jax.Array,
    gate: jax.Array,
    start: jax.Array,
    end: jax.Array,
    *,
    ratio: int,
    overlap: bool,
    dtype: jax.typing.DTypeLike,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """`reference.pool_window` on the TPU `chip`. Blocks of sequences that complete nothing are not read.

    Raises:
      ValueError: as the reference; D is no multiple of 128, or `chip` is not a TPU.
    """
    require(chip, "pool_window_tpu", platform="tpu")
    check_shapes(kv, gate, start, end, ratio, overlap)
    B, R, W = kv.shape
    D = W // (1 + overlap)
    if D % LANES:
        raise ValueError(f"pool_window_tpu: {D} channels are no multiple of {LANES}; use the jnp op")
    size = max(n for n in range(1, GROUP + 1) if B % n == 0 and (n == 1 or 4 * n * R * W <= BLOCK_BYTES))

    def block(i, start_ref, end_ref):  # the same one again is not fetched again
        return jnp.where(_any_complete(i, size, start_ref, end_ref, ratio), i, 0), 0, 0

    ring = pl.BlockSpec((size, R, W), block)
    return pl.pallas_call(
        functools.partial(_kernel, ratio=ratio, overlap=overlap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B // size,),
            in_specs=[ring, ring],
            out_specs=pl.BlockSpec((B, D), lambda i, *_: (0, 0)),
            scratch_shapes=[pltpu.VMEM((D // LANES, B, LANES), jnp.float32)],  # whose rows are written one by one,
        ),
        out_shape=jax.ShapeDtypeStruct((B, D), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="pool_window",
    )(start.astype(jnp.int32), end.astype(jnp.int32), kv, gate)
