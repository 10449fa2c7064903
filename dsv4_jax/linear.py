"""Parameters, linear maps and norms: the pieces every other layer is made of."""

from __future__ import annotations

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import Quantization, WeightFormat
from dsv4_jax.quantized import FP4_BLOCK, QuantizedArray, Turned, Weight, dequantize, dequantize_halves
from pallas_kernels.rms_norm import rms_norm

FEW_ROWS = 128  # up to which packing a weight for a product costs a CPU more than packing the rows


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
    if isinstance(w, QuantizedArray) and w.packed and w.scale is not None:
        even, odd = dequantize_halves(w, x.dtype)
        return (matmul(x[..., 0::2], even) + matmul(x[..., 1::2], odd)).astype(out_dtype)
    return matmul(x, dequantize(w, x.dtype)).astype(out_dtype)


def matmul(x: jax.Array, w: jax.Array | Turned) -> jax.Array:
    """x [..., K], w [N, K] -> fp32 [..., N]; fp32 operands are multiplied in true fp32 on every platform."""
    rows = math.prod(x.shape[:-1])
    if not 1 < rows <= FEW_ROWS or isinstance(w, Turned):
        return _matmul(x, w)
    return jax.lax.platform_dependent(x, w, cpu=_weight_first, default=_matmul)


def _matmul(x: jax.Array, w: jax.Array | Turned) -> jax.Array:
    w, axis = (w.data, 0) if isinstance(w, Turned) else (w, w.ndim - 1)
    return _product(x, w, x.ndim - 1, axis)


def _weight_first(x: jax.Array, w: jax.Array) -> jax.Array:
    """As `_matmul`: the first operand is read where it lies, the second packed. Without a barrier XLA swaps them."""
    rows = x.reshape(-1, x.shape[-1])
    columns = jax.lax.optimization_barrier(_product(w, rows, 1, 1))
    return columns.T.reshape(*x.shape[:-1], -1)


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contract = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


class Norms(Protocol):
    """What a platform may do faster."""

    def rms_norm(self, x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
        """See `pallas_kernels.rms_norm.reference.rms_norm`."""
        ...


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned fp32 weight [D]."""

    def __init__(self, dim: int, eps: float, kernels: Norms | None = None):
        self.weight, self.eps, self.kernels = nnx.Param(jnp.ones((dim,), jnp.float32)), eps, kernels

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        if self.kernels is None:
            return rms_norm(x, self.weight[...], eps=self.eps)
        return self.kernels.rms_norm(x, self.weight[...], self.eps)
