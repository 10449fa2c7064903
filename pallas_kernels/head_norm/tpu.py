"""Query heads on TPU: read once, normed, turned, written once. XLA makes some ten programs of it.

A projection leaves a token's heads side by side in one row; attention wants a row for each. They change places in here,
on their way through vector memory, which spares XLA a copy of all of them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.fp8_matmul.tpu import rotation_tables
from pallas_kernels.head_norm.reference import check_shapes

LANES = 128
ROWS = 16  # tokens of a tile, at most
HEADS = 16  # rows of a tile of 16-bit values
TILE_BYTES = 1 << 21  # of a tile in fp32, about
TOGETHER = 8  # tokens whose sums overlap


def _turn(normed: jax.Array, own: jax.Array, partner: jax.Array) -> jax.Array:
    """128 channels of heads, [heads, 128], turned as `rotate_back` does.

    Its rolls in fp32 take a quarter longer for the whole kernel; a 32-bit word holds two heads in 16 bits.
    """
    swap = lambda x: jnp.take_along_axis(x, jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) ^ 1, axis=1)
    if normed.dtype.itemsize == 2 and len(normed) % 2 == 0:
        other = pltpu.bitcast(swap(pltpu.bitcast(normed, jnp.int32)), normed.dtype)
    else:
        other = swap(normed)
    return (normed.astype(jnp.float32) * own + other.astype(jnp.float32) * partner).astype(normed.dtype)


def _kernel(q_ref, own_ref, partner_ref, out_ref, turned_ref, *, eps: float):
    """A tile [tokens, heads * D] becomes [tokens, heads, D] on the way: rows are tokens first, then a token's heads."""
    tokens, heads, D = out_ref.shape

    for h in range(heads):
        for i in range(D // LANES):
            start = h * D + i * LANES
            turned_ref[i, h * tokens : (h + 1) * tokens] = q_ref[:, start : start + LANES].astype(jnp.float32)

    def norm(t):
        at = pl.ds(t, heads, stride=tokens)
        chunks = [turned_ref[pl.ds(i, 1), at][0] for i in range(D // LANES)]
        mean = jnp.sum(sum(jnp.square(chunk) for chunk in chunks), axis=1, keepdims=True) * (1 / D)
        factor = jax.lax.rsqrt(mean + eps)
        normed = [(chunk * factor).astype(out_ref.dtype) for chunk in chunks]
        normed[-1] = _turn(normed[-1], own_ref[pl.ds(t, 1)], partner_ref[pl.ds(t, 1)])
        for i, chunk in enumerate(normed):
            out_ref[t, :, i * LANES : (i + 1) * LANES] = chunk

    together = max(n for n in range(1, TOGETHER + 1) if tokens % n == 0)

    def several(i, carry):
        for j in range(together):
            norm(i * together + j)
        return carry

    jax.lax.fori_loop(0, tokens // together, several, 0)


def norm_heads_tpu(
    q: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """`reference.norm_heads` on the TPU `chip`.

    Raises:
      ValueError: the shapes disagree, D is no multiple of 128, more than 128 channels turn, or `chip` is not a TPU.
    """
    check_shapes(q, cos, sin)
    require(chip, "norm_heads_tpu", platform="tpu")
    B, T, H, D = q.shape
    if D % LANES or 2 * cos.shape[-1] > LANES:
        raise ValueError(f"norm_heads_tpu: heads of {D} channels, not whole registers of {LANES}; use the jnp op")
    tokens, width = B * T, H * D
    tables = rotation_tables(*(t.astype(jnp.float32).reshape(tokens, -1) for t in (cos, -sin)))
    rows = min(ROWS, tokens)
    whole = [n for n in range(1, H + 1) if H % n == 0 and (n == H or n % HEADS == 0)]
    heads = max((n for n in whole if 4 * n * D * rows <= TILE_BYTES), default=whole[0])
    table = pl.BlockSpec((rows, LANES), lambda i, h: (i, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        grid=(pl.cdiv(tokens, rows), H // heads),
        in_specs=[pl.BlockSpec((rows, heads * D), lambda i, h: (i, h)), table, table],
        out_specs=pl.BlockSpec((rows, heads, D), lambda i, h: (i, h, 0)),
        out_shape=jax.ShapeDtypeStruct((tokens, H, D), q.dtype),
        scratch_shapes=[pltpu.VMEM((D // LANES, rows * heads, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="norm_heads",
    )(q.reshape(tokens, width), *tables)
    return out.reshape(q.shape)
