"""Parameters, linear maps and norms: the pieces every other layer is made of."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import Quantization, WeightFormat
from dsv4_jax.quantized import FP4_BLOCK, QuantizedArray, Weight, dequantize


class Buffer(nnx.Variable):
    """Saved in checkpoints, never trained (the hash routing table)."""


def weight(shape: tuple[int, ...], dtype, quantization: Quantization | None, form: WeightFormat) -> nnx.Param:
    """A zero [..., N, K] weight in its stored format: `dtype` for "bf16", else a QuantizedArray."""
    if quantization is None or form == "bf16":
        return nnx.Param(jnp.zeros(shape, dtype))
    *lead, rows, columns = shape
    block = FP4_BLOCK if form == "fp4" else quantization.block
    grid = (*lead, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    e8m0 = form == "fp4" or quantization.scale_format == "e8m0"
    scale = jnp.zeros(grid, jnp.uint8 if e8m0 else jnp.float32)
    packed = form == "fp4"
    data = jnp.zeros((*lead, rows, columns // 2), jnp.uint8) if packed else jnp.zeros(shape, jnp.float8_e4m3fn)
    return nnx.Param(QuantizedArray(data, scale, block, packed))


def linear(x: jax.Array, w: Weight, *, out_dtype=None) -> jax.Array:
    """x [..., K] times w [N, K] -> [..., N], accumulated in fp32 and rounded once to `out_dtype` (default x.dtype).

    A quantised weight is expanded here, at use; both operands of the product have x's dtype.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    return matmul(x, dequantize(w, x.dtype)).astype(out_dtype)


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., K], w [N, K] -> fp32 [..., N]; fp32 operands are multiplied in true fp32 on every platform."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (w.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, times `weight` if there is one: fp32 inside, one rounding to x.dtype."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide if weight is None else wide * weight).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned fp32 weight [D]."""

    def __init__(self, dim: int, eps: float):
        self.weight, self.eps = nnx.Param(jnp.ones((dim,), jnp.float32)), eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)
