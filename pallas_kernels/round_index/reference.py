"""The contract of rounded index queries and keys, in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.formats import decode_e8m0, fp4_scale, hadamard, in_groups, round_e2m1
from pallas_kernels.fp8_matmul.reference import turn
from pallas_kernels.index_rows import GROUP, Fp4Rows, quantize_index_rows


def round_fp4(x: jax.Array) -> jax.Array:
    """Each 32 channels of x [..., K] as e2m1 codes times a power of two, wide again in x.dtype."""
    groups = in_groups(x.astype(jnp.float32), GROUP)
    byte = fp4_scale(jnp.max(jnp.abs(groups), axis=-1, keepdims=True))
    rounded = round_e2m1(groups * decode_e8m0(254 - byte)) * decode_e8m0(byte)
    return rounded.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].astype(x.dtype)


def round_index(x: jax.Array) -> jax.Array:
    """The Hadamard transform of x [..., D], D a power of two, then `round_fp4`.

    The transform is summed in fp32, width after width from 1 on, and rounded to x.dtype in between.
    Source: architecture 5 and 8.3.
    """
    return round_fp4(hadamard(x))


def rotated_index(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Index queries or keys [..., D], rotated and rounded to x.dtype, then `round_index`.

    cos, sin: float32 [..., R / 2], broadcast; they turn the trailing R channels, in pairs. Source: architecture 3.4.
    """
    return round_index(turn(x, cos, sin))


def encode_index(x: jax.Array, cos: jax.Array, sin: jax.Array) -> Fp4Rows:
    """`rotated_index` of keys [..., D] as a cache of 4 bits holds them, with nothing more lost."""
    return quantize_index_rows(rotated_index(x, cos, sin))
