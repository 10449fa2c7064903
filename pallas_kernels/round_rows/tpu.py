"""Rounded activations on TPU, in one program where XLA makes five."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.formats import E4M3_MAX, FP8_SMALLEST
from pallas_kernels.round_rows.reference import GROUP

ROWS, CHANNELS = 256, 1024  # of a tile, at most
FEW_ROWS = 32  # up to here a tile has all channels


def power(exponent: jax.Array) -> jax.Array:
    """2^(exponent - 127), for biased exponents 1 .. 254."""
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def scale_exponent(amax: jax.Array) -> jax.Array:
    """The biased exponent of the least power of two that is not below a normal fp32 number."""
    return ((jax.lax.bitcast_convert_type(amax, jnp.int32) + 0x7FFFFF) >> 23) & 0xFF


def round_to_grid(x: jax.Array, *, mantissa: int, lowest: int, largest: float) -> jax.Array:
    """`formats` rounding: adding and taking away 1.5 * 2^23 steps leaves a whole number of steps, ties to even."""
    x = jnp.clip(x, -largest, largest)
    exponent = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
    magic = jnp.float32(1.5 * 2**23) * power(jnp.maximum(exponent, lowest + 127) - mantissa)
    return (x + magic) - magic


def round_group(x: jax.Array) -> jax.Array:
    """fp32 [rows, 128], a group a row; every step but the rounding is exact."""
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=1, keepdims=True), FP8_SMALLEST) * jnp.float32(1 / E4M3_MAX)
    scale = jnp.broadcast_to(scale_exponent(amax), x.shape)
    return round_to_grid(x * power(254 - scale), mantissa=3, lowest=-6, largest=E4M3_MAX) * power(scale)


def _kernel(x_ref, out_ref):
    for start in range(0, x_ref.shape[1], GROUP):
        cut = slice(start, start + GROUP)
        out_ref[:, cut] = round_group(x_ref[:, cut].astype(jnp.float32)).astype(out_ref.dtype)


def round_rows_tpu(x: jax.Array, *, chip: Chip, interpret: bool | pltpu.InterpretParams = False) -> jax.Array:
    """`reference.round_rows` of 128 channels on the TPU `chip`.

    Raises:
      ValueError: K is no multiple of 128, or `chip` is not a TPU.
    """
    require(chip, "round_rows_tpu", platform="tpu")
    *lead, K = x.shape
    if K % GROUP:
        raise ValueError(f"round_rows_tpu: {K} channels are no multiple of {GROUP}; use the jnp op")
    if not x.size:
        return x
    held = x.reshape(-1, K)
    rows = min(ROWS, len(held))
    width = K if rows <= FEW_ROWS else max(n for n in range(GROUP, min(CHANNELS, K) + 1, GROUP) if K % n == 0)
    block = pl.BlockSpec((rows, width), lambda i, k: (i, k))
    out = pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(len(held), rows), K // width),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(held.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="round_rows",
    )(held)
    return out.reshape(x.shape)
