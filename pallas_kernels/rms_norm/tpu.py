"""The norm on TPU, in one program where XLA makes three."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require

LANES = 128
CHAINS = 4  # of sums that do not wait for each other
ROWS = 128  # of a tile, at most
TILE_BYTES = 1 << 21  # of a tile in fp32, about


def mean_square(x_ref) -> jax.Array:
    """fp32 [rows, 1] of a tile [rows, D]."""
    sums: list[Any] = [0.0] * CHAINS
    for i, start in enumerate(range(0, x_ref.shape[1], LANES)):
        sums[i % CHAINS] += jnp.square(x_ref[:, start : start + LANES].astype(jnp.float32))
    return functools.reduce(jnp.add, sums).sum(-1, keepdims=True) / x_ref.shape[1]


def rms_factor(x_ref, eps: float) -> jax.Array:
    """fp32 [rows, 1]: one over the root mean square of each row of a tile [rows, D]."""
    return jax.lax.rsqrt(mean_square(x_ref) + eps)


def _kernel(x_ref, weight_ref, out_ref, *, eps: float):
    factor = rms_factor(x_ref, eps)
    for start in range(0, x_ref.shape[1], LANES):
        cut = slice(start, start + LANES)
        out_ref[:, cut] = (x_ref[:, cut].astype(jnp.float32) * factor * weight_ref[:, cut]).astype(out_ref.dtype)


def row_tile(rows: int, channels: int) -> int:
    """Rows of a tile: all of few, of more as many as fit, a multiple of what every dtype is tiled by."""
    return min(rows, ROWS, max(TILE_BYTES // (4 * channels) // 32 * 32, 32))


def rms_norm_tpu(
    x: jax.Array, weight: jax.Array, *, eps: float, chip: Chip, interpret: bool | pltpu.InterpretParams = False
) -> jax.Array:
    """`reference.rms_norm` on the TPU `chip`.

    Raises:
      ValueError: the shapes disagree, D is no multiple of 128, or `chip` is not a TPU.
    """
    require(chip, "rms_norm_tpu", platform="tpu")
    *lead, D = x.shape
    if weight.shape != (D,):
        raise ValueError(f"rms_norm_tpu: weight {weight.shape} does not fit x {x.shape}")
    if D % LANES:
        raise ValueError(f"rms_norm_tpu: {D} channels are no multiple of {LANES}; use the jnp op")
    if not x.size:
        return x
    held = x.reshape(-1, D)
    rows = row_tile(len(held), D)
    block = pl.BlockSpec((rows, D), lambda i: (i, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        grid=(pl.cdiv(len(held), rows),),
        in_specs=[block, pl.BlockSpec((1, D), lambda i: (0, 0))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(held.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="rms_norm",
    )(held, weight.astype(jnp.float32)[None])
    return out.reshape(x.shape)
