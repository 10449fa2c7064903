"""The contract of rounded activations, in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.formats import decode_e8m0, fp8_scale, in_groups, round_e4m3

GROUP = 128  # channels of an activation that share a scale


def round_rows(x: jax.Array, group: int = GROUP) -> jax.Array:
    """Each `group` channels as e4m3 codes times a power of two, wide again.

    Args:
      x: [..., K]; a last group may be short.
    Returns:
      [..., K] in x.dtype, exact in bfloat16 and wider. What is not finite stays so.
    Source: architecture 8.2.
    """
    groups = in_groups(x.astype(jnp.float32), group)
    byte = fp8_scale(jnp.max(jnp.abs(groups), axis=-1, keepdims=True))
    rounded = round_e4m3(groups * decode_e8m0(254 - byte)) * decode_e8m0(byte)
    return rounded.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].astype(x.dtype)
