"""Index queries rotated and rounded on TPU: the matrix unit transforms them, and turns them, so that channels are rows.

The 32 channels of a scale are then whole registers, whose maximum costs little. XLA makes two passes over all queries
for each of the transform's seven widths, with heads cut into pieces narrower than a register.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.formats import E2M1_MAX, FP4_SMALLEST
from pallas_kernels.fp8_matmul.tpu import rotate_back, rotation_tables
from pallas_kernels.index_rows import GROUP
from pallas_kernels.round_rows.tpu import power, round_to_grid, scale_exponent

LANES, SUBLANES = 128, 8
ROWS, LEAST = 1024, 16  # heads of a tile: at most, and what the matrix unit of every generation takes
BY_CHANNELS, BACK = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def _signs() -> jax.Array:
    """The Hadamard matrix in Sylvester's order, without its factor: -1 where row and column share an odd number of
    bits."""
    shared = functools.reduce(jnp.bitwise_and, [jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), i) for i in (0, 1)])
    for shift in (4, 2, 1):
        shared ^= shared >> shift
    return jnp.where(shared & 1 == 1, -1.0, 1.0)


def _round(x: jax.Array) -> jax.Array:
    """fp32 [32, heads], a scale a column."""
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=0, keepdims=True), FP4_SMALLEST) * jnp.float32(1 / E2M1_MAX)
    scale = jnp.broadcast_to(scale_exponent(amax), x.shape)
    return round_to_grid(x * power(254 - scale), mantissa=1, lowest=0, largest=E2M1_MAX) * power(scale)


def _kernel(x_ref, own_ref, partner_ref, out_ref):
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    own, partner = (_of_heads(table[...], x_ref.shape[0]) for table in (own_ref, partner_ref))
    x = rotate_back(x_ref[...], own, partner)
    turned = dot(_signs().astype(x.dtype), x, BY_CHANNELS, precision=precision)  # [channels, heads]
    turned = (turned * jnp.float32(LANES**-0.5)).astype(out_ref.dtype).astype(jnp.float32)
    rounded = jnp.concatenate([_round(turned[i : i + GROUP]) for i in range(0, LANES, GROUP)]).astype(jnp.bfloat16)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), i) for i in (0, 1))
    out_ref[...] = dot(rounded, jnp.where(row == lane, 1.0, 0.0).astype(jnp.bfloat16), BACK).astype(out_ref.dtype)


def _of_heads(table: jax.Array, heads: int) -> jax.Array:
    """A row for each token -> one for each of their heads."""
    tokens = table.shape[0]
    if tokens == heads:
        return table
    return jnp.broadcast_to(table[:, None], (tokens, heads // tokens, LANES)).reshape(heads, LANES)


def round_index_tpu(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """`reference.rotated_index` of heads of 128 channels on the TPU `chip`, but for the order of the transform's sums.

    Args:
      x: [..., 128]; cos, sin: float32 [..., R / 2] with as many axes; one along an axis stands for all of x's.
      chip: the TPU to compile for.
    Raises:
      ValueError: D is not 128, the rotation does not fit x, or `chip` is not a TPU.
    """
    require(chip, "round_index_tpu", platform="tpu")
    if x.shape[-1] != LANES:
        raise ValueError(f"round_index_tpu: heads of {x.shape[-1]} channels, not {LANES}; use the jnp op")
    heads, tokens = x.size // LANES, math.prod(cos.shape[:-1])
    lead, fits = x.shape[:-1], [n in (1, m) for n, m in zip(cos.shape[:-1], x.shape[:-1], strict=False)]
    if cos.ndim != x.ndim or not all(fits) or cos.shape != sin.shape or 2 * cos.shape[-1] > LANES:
        raise ValueError(f"round_index_tpu: cos {cos.shape} and sin {sin.shape} do not fit x {x.shape}")
    if not x.size:
        return x
    each = heads // tokens
    if cos.shape[:-1] != (*x.shape[: cos.ndim - 2], 1) or each % SUBLANES:  # not tokens of many heads
        cos, sin = (jnp.broadcast_to(table, (*lead, table.shape[-1])) for table in (cos, sin))
        tokens, each = heads, 1
    tables = rotation_tables(*(t.astype(jnp.float32).reshape(tokens, -1) for t in (cos, -sin)))
    extra = max(0, LEAST - heads)
    held = jnp.pad(x.reshape(heads, LANES), ((0, extra), (0, 0)))
    own, partner = (jnp.pad(table, ((0, extra if each == 1 else 0), (0, 0))) for table in tables)
    tile = min(max(ROWS // each, SUBLANES), len(own))  # tokens
    block = pl.BlockSpec((tile * each, LANES), lambda i: (i, 0))
    table = pl.BlockSpec((tile, LANES), lambda i: (i, 0))
    out = pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(len(own), tile),),
        in_specs=[block, table, table],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(held.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="round_index",
    )(held, own, partner)
    return out[:heads].reshape(x.shape)
