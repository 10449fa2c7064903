"""The contract of the norm, in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array | None, *, eps: float) -> jax.Array:
    """x over its root mean square, times `weight` if there is one.

    Args:
      x: [..., D].
      weight: float32 [D], or None.
      eps: added to the mean square.
    Returns:
      [..., D] in x.dtype: fp32 inside, rounded once.
    Source: architecture 2.4.
    """
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide if weight is None else wide * weight).astype(x.dtype)
