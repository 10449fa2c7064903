"""Index queries and keys rotated and rounded on TPU: the matrix unit transforms and turns them: channels become rows.

The 32 channels of a scale are then whole registers, whose maximum costs little. XLA makes two passes over all queries
for each of the transform's seven widths, with heads cut into pieces narrower than a register.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.formats import E2M1_MAX, FP4_SMALLEST
from pallas_kernels.fp8_matmul.tpu import rotate_back, rotation_tables
from pallas_kernels.index_rows import GROUP, Fp4Rows
from pallas_kernels.round_rows.tpu import power, round_to_grid, scale_exponent

LANES, SUBLANES = 128, 8
ROWS, LEAST = 1024, 32  # heads of a tile: at most, and at least, which is a tile of bytes
BYTES = LANES // 2 + LANES // GROUP  # of a key: its codes, then its scales
BY_CHANNELS, BACK = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


_dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


def _signs() -> jax.Array:
    """The Hadamard matrix in Sylvester's order, without its factor: -1 where row and column share an odd number of
    bits."""
    shared = functools.reduce(jnp.bitwise_and, [lax.broadcasted_iota(jnp.int32, (LANES, LANES), i) for i in (0, 1)])
    for shift in (4, 2, 1):
        shared ^= shared >> shift
    return jnp.where(shared & 1 == 1, -1.0, 1.0)


def _of_heads(table: jax.Array, heads: int) -> jax.Array:
    """A row for each token -> one for each of their heads."""
    tokens = table.shape[0]
    if tokens == heads:
        return table
    return jnp.broadcast_to(table[:, None], (tokens, heads // tokens, LANES)).reshape(heads, LANES)


def _transform(x_ref, own_ref, partner_ref) -> jax.Array:
    """Heads [heads, 128], rotated, transformed, rounded to their dtype after either, as fp32 [channels, heads]."""
    x = rotate_back(x_ref[...], *(_of_heads(table[...], x_ref.shape[0]) for table in (own_ref, partner_ref)))
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    turned = _dot(_signs().astype(x.dtype), x, BY_CHANNELS, precision=precision)
    return (turned * jnp.float32(LANES**-0.5)).astype(x.dtype).astype(jnp.float32)


def _round(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """fp32 [32, heads] -> e2m1 values, and the exponent byte of their scale, one a column, in every row."""
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=0, keepdims=True), FP4_SMALLEST) * jnp.float32(1 / E2M1_MAX)
    scale = jnp.broadcast_to(scale_exponent(amax), x.shape)
    return round_to_grid(x * power(254 - scale), mantissa=1, lowest=0, largest=E2M1_MAX), scale


def _widen(x: jax.Array) -> jax.Array:
    values, scale = _round(x)
    return values * power(scale)


def _encode(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """fp32 [32, heads] -> the codes of what `_round` leaves, and the byte of its scale in every row, both int32."""
    values, scale = _round(x)
    # A group rounded down to half of its scale's reach is held by half the scale.
    is_low = (jnp.max(jnp.abs(values), axis=0, keepdims=True) <= E2M1_MAX / 2) & (scale > 1)
    bits = lax.bitcast_convert_type(jnp.where(is_low, values * 2, values), jnp.int32)
    exponent = (bits >> 23) & 0xFF
    code = jnp.where(exponent >= 127, (exponent - 126) * 2 + ((bits >> 22) & 1), jnp.where(exponent == 126, 1, 0))
    return code + jnp.where(lax.bitcast_convert_type(x, jnp.int32) < 0, 8, 0), jnp.where(is_low, scale - 1, scale)


def _kernel(x_ref, own_ref, partner_ref, out_ref):
    turned = _transform(x_ref, own_ref, partner_ref)
    rounded = jnp.concatenate([_widen(turned[i : i + GROUP]) for i in range(0, LANES, GROUP)]).astype(jnp.bfloat16)
    row, lane = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), i) for i in (0, 1))
    out_ref[...] = _dot(rounded, jnp.where(row == lane, 1.0, 0.0).astype(jnp.bfloat16), BACK).astype(out_ref.dtype)


def _encode_kernel(x_ref, own_ref, partner_ref, out_ref):
    """The product that turns heads back joins two codes in a byte, too, and puts the scales behind them."""
    turned = _transform(x_ref, own_ref, partner_ref)
    parts = [_encode(turned[i : i + GROUP]) for i in range(0, LANES, GROUP)]
    codes, scales = (
        jnp.concatenate(each).astype(jnp.float32).astype(jnp.bfloat16) for each in zip(*parts, strict=True)
    )
    row, lane = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), i) for i in (0, 1))
    pairs = jnp.where(lane == row // 2, jnp.where(row % 2 == 1, 16.0, 1.0), 0.0).astype(jnp.bfloat16)
    places = jnp.where(lane * GROUP == row + LANES // 2 * GROUP, 1.0, 0.0).astype(jnp.bfloat16)
    held = _dot(codes, pairs, BACK) + _dot(scales, places, BACK)  # whole numbers up to 255
    out_ref[...] = held[:, : out_ref.shape[1]].astype(jnp.int32).astype(out_ref.dtype)


def round_index_tpu(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, chip: Chip, interpret: bool | pltpu.InterpretParams = False
) -> jax.Array:
    """`reference.rotated_index` of heads of 128 channels on the TPU `chip`, but for the order of the transform's sums.

    Args:
      x: [..., 128]; cos, sin: float32 [..., R / 2] with as many axes; one along an axis stands for all of x's.
      chip: the TPU to compile for.
    Raises:
      ValueError: D is not 128, the rotation does not fit x, or `chip` is not a TPU.
    """
    return _run(_kernel, x, cos, sin, LANES, x.dtype, "round_index", chip, interpret)


def encode_index_tpu(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, chip: Chip, interpret: bool | pltpu.InterpretParams = False
) -> Fp4Rows:
    """`reference.encode_index` of keys of 128 channels; arguments, what may differ and errors as `round_index_tpu`."""
    return Fp4Rows(_run(_encode_kernel, x, cos, sin, BYTES, jnp.uint8, "encode_index", chip, interpret), LANES)


def _run(kernel, x, cos, sin, width: int, dtype, name: str, chip: Chip, interpret) -> jax.Array:
    """x [..., 128] -> [..., width] in `dtype`, a head after the other."""
    require(chip, f"{name}_tpu", platform="tpu")
    if x.shape[-1] != LANES:
        raise ValueError(f"{name}_tpu: heads of {x.shape[-1]} channels, not {LANES}; use the jnp op")
    lead, fits = x.shape[:-1], [n in (1, m) for n, m in zip(cos.shape[:-1], x.shape[:-1], strict=False)]
    if cos.ndim != x.ndim or not all(fits) or cos.shape != sin.shape or 2 * cos.shape[-1] > LANES:
        raise ValueError(f"{name}_tpu: cos {cos.shape} and sin {sin.shape} do not fit x {x.shape}")
    if not x.size:
        return jnp.zeros((*lead, width), dtype)
    heads, tokens = x.size // LANES, math.prod(cos.shape[:-1])
    each = heads // tokens
    if cos.shape[:-1] != (*x.shape[: cos.ndim - 2], 1) or each % SUBLANES:  # not tokens of many heads
        cos, sin = (jnp.broadcast_to(table, (*lead, table.shape[-1])) for table in (cos, sin))
        tokens, each = heads, 1
    tables = rotation_tables(*(t.astype(jnp.float32).reshape(tokens, -1) for t in (cos, -sin)))
    # A block may reach past the end: heads do not mix.
    tile = min(max(ROWS // each, SUBLANES), max(pl.cdiv(LEAST, each), tokens))
    block = lambda rows, width: pl.BlockSpec((rows, width), lambda i: (i, 0))
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(tokens, tile),),
        in_specs=[block(tile * each, LANES), block(tile, LANES), block(tile, LANES)],
        out_specs=block(tile * each, width),
        out_shape=jax.ShapeDtypeStruct((heads, width), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name=name,
    )(x.reshape(heads, LANES), *tables)
    return out.reshape(*lead, width)
