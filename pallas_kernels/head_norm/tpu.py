"""Query heads on TPU: read once, normed, turned, written once. XLA makes some ten programs of it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.fp8_matmul.tpu import rotate_back, rotation_tables
from pallas_kernels.head_norm.reference import check_shapes

LANES = 128
ROWS = 128  # tokens of a tile, at most
TILE_BYTES = 1 << 20  # of a tile in fp32, about
UNROLLED = 8  # heads whose sums overlap


def _kernel(q_ref, own_ref, partner_ref, out_ref, *, head_dim: int, eps: float):
    def head(i):
        first = pl.multiple_of(i * head_dim, LANES)
        cuts = [pl.ds(pl.multiple_of(first + lane, LANES), LANES) for lane in range(0, head_dim, LANES)]
        chunks = [q_ref[:, cut].astype(jnp.float32) for cut in cuts]
        mean = jnp.sum(sum(jnp.square(chunk) for chunk in chunks), axis=1, keepdims=True) * (1 / head_dim)
        factor = jax.lax.rsqrt(mean + eps)
        normed = [(chunk * factor).astype(out_ref.dtype) for chunk in chunks]
        normed[-1] = rotate_back(normed[-1], own_ref[...], partner_ref[...])
        for cut, chunk in zip(cuts, normed, strict=True):
            out_ref[:, cut] = chunk

    def several(i, carry):
        for j in range(together):
            head(i * together + j)
        return carry

    heads = q_ref.shape[1] // head_dim
    together = max(n for n in range(1, UNROLLED + 1) if heads % n == 0)
    jax.lax.fori_loop(0, heads // together, several, 0)


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
    heads = max(n for n in range(1, H + 1) if H % n == 0 and (n == 1 or 4 * n * D * rows <= TILE_BYTES))
    block = pl.BlockSpec((rows, heads * D), lambda i, h: (i, h))
    table = pl.BlockSpec((rows, LANES), lambda i, h: (i, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, head_dim=D, eps=eps),
        grid=(pl.cdiv(tokens, rows), H // heads),
        in_specs=[block, table, table],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((tokens, width), q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="norm_heads",
    )(q.reshape(tokens, width), *tables)
    return out.reshape(q.shape)
