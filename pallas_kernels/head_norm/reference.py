"""The contract of the queries' norm and rotation, in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.reference import inverse_rope


def check_shapes(q: jax.Array, cos: jax.Array, sin: jax.Array) -> None:
    """Raise where the operands of `norm_heads` do not fit each other."""
    if q.ndim != 4 or cos.shape != sin.shape or cos.shape[:2] != q.shape[:2] or 2 * cos.shape[-1] > q.shape[-1]:
        raise ValueError(f"norm_heads: cos {cos.shape} and sin {sin.shape} do not fit q {q.shape}")


def norm_heads(q: jax.Array, cos: jax.Array, sin: jax.Array, *, eps: float) -> jax.Array:
    """Each head over its RMS, without a weight, then its trailing channels turned by RoPE.

    Args:
      q: [B, T, H, D].
      cos, sin: float32 [B, T, R / 2], of the queries' positions; they turn the trailing R channels, in pairs.
      eps: added to the mean square.
    Returns:
      [B, T, H, D] in q.dtype: fp32 inside, rounded once before and once after the rotation.
    Raises:
      ValueError: the shapes disagree.
    Source: architecture 3.2 and 3.4.
    """
    check_shapes(q, cos, sin)
    wide = q.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return inverse_rope(wide.astype(q.dtype), cos, -sin)
