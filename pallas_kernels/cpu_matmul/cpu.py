"""The op on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.cpu_matmul import few, many
from pallas_kernels.cpu_matmul.expand import HALF
from pallas_kernels.cpu_matmul.reference import StoredWeights
from pallas_kernels.cpu_matmul.tile import LANES

FEW_ROWS = 8  # of a block, up to which weights are read rather than rows laid out
KINDS = (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.uint8)  # of a weight


def stored_matmul_cpu(
    x: jax.Array, row: jax.Array | None, expert: jax.Array, used: jax.Array, weights: Sequence[StoredWeights]
) -> tuple[jax.Array, ...]:
    """See `stored_matmul`. Raises ValueError for weights of kinds that it does not know or that differ in kind."""
    row = jnp.arange(len(x), dtype=jnp.int32) if row is None else row
    check(x, row, expert, weights)
    first, n, blocks = weights[0], len(row), len(expert)
    is_few = n // blocks <= FEW_ROWS
    if is_few and first.data.dtype == jnp.uint8:  # as the codes of a byte are expanded
        x = jnp.concatenate([x[:, 0::2], x[:, 1::2]], axis=1)
    scales: list[jax.Array] = []
    if first.scale is not None:
        scales = [w.scale for w in weights if w.scale is not None] + [jnp.asarray(first.block, jnp.int32)]
    out = tuple(jax.ShapeDtypeStruct((n, w.data.shape[1]), jnp.float32) for w in weights)
    if not is_few:  # and the tiles
        out += (jax.ShapeDtypeStruct((blocks * -(-(n // blocks) // LANES), x.shape[1], LANES), jnp.float32),)
    run = jax.ffi.ffi_call(few.TARGET if is_few else many.TARGET, out, vmap_method="sequential")
    return tuple(run(x, row, expert, jnp.reshape(used, (1,)), *(w.data for w in weights), *scales)[: len(weights)])


def check(x: jax.Array, row: jax.Array, expert: jax.Array, weights: Sequence[StoredWeights]) -> None:
    """Raises ValueError for operands that do not fit."""
    first = weights[0]
    for w in weights:
        kind = (w.data.dtype, w.scale is None, w.block, w.data.shape[0], w.data.shape[2])
        if kind != (first.data.dtype, first.scale is None, first.block, first.data.shape[0], first.data.shape[2]):
            of = f"{first.data.dtype}{list(first.data.shape)}"
            raise ValueError(f"stored_matmul: weights differ in kind: {of}, {kind}")
    packed = first.data.dtype == jnp.uint8
    if first.data.dtype not in KINDS or (first.scale is None) == (first.data.dtype.itemsize == 1):
        raise ValueError(
            f"stored_matmul: {first.data.dtype} weights, scale {first.scale}: not float32, bfloat16, FP8 or FP4"
        )
    if x.dtype != jnp.float32 or x.shape[1] != first.data.shape[2] * (1 + packed) or len(row) % len(expert):
        rows = f"{len(row)} rows in {len(expert)} blocks"
        shapes = f"x {x.dtype}{list(x.shape)} does not fit w {list(first.data.shape)}"
        raise ValueError(f"stored_matmul: {shapes}, or {rows} are not even")
    if packed and (first.block != (1, 2 * HALF) or x.shape[1] % (2 * HALF)):
        raise ValueError(
            f"stored_matmul: FP4 has a scale per row and {2 * HALF} channels, not {first.block} of {x.shape[1]}"
        )
