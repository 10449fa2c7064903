"""The contract of a compressor's pooling when few tokens come, in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def check_shapes(kv: jax.Array, gate: jax.Array, start: jax.Array, end: jax.Array, ratio: int, overlap: bool) -> None:
    """Raise where the operands of `pool_window` do not fit each other."""
    if kv.ndim != 3 or kv.shape != gate.shape or start.shape != kv.shape[:1] or end.shape != start.shape:
        raise ValueError(f"pool_window: {start.shape}, {end.shape}, {gate.shape} do not fit rows {kv.shape}")
    if kv.dtype != jnp.float32 or gate.dtype != jnp.float32:
        raise ValueError(f"pool_window: rows are {kv.dtype} and {gate.dtype}, not float32")
    if kv.shape[1] < ratio * (1 + overlap) or kv.shape[2] % (1 + overlap):
        raise ValueError(f"pool_window: rings {kv.shape} do not hold windows of {ratio} rows{' twice' * overlap}")


def pool_window(
    kv: jax.Array,
    gate: jax.Array,
    start: jax.Array,
    end: jax.Array,
    *,
    ratio: int,
    overlap: bool,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Per channel, the sum of a window's rows weighted by the softmax of their gates.

    Args:
      kv, gate: float32 rings [B, R, W] that hold the step already: position p in slot p % R, up to end - 1. R is at
        least the rows of an entry and those of the step but one. With overlap W is 2 D, else D.
      start, end: int32 [B]; the step's positions are start .. end - 1, at most `ratio`.
      ratio: rows of a window; entry i is complete with position (i + 1) * ratio - 1.
      overlap: channels [D:] of the own window, and [:D] of the one before, which entry 0 has not.
    Returns:
      [B, D] in `dtype`, fp32 inside: the entry that each sequence completes, zeros where it completes none. Whatever
      else the rings hold has no influence.
    Raises:
      ValueError: shapes or dtypes do not fit.
    Source: architecture 4.2 and 4.4.
    """
    check_shapes(kv, gate, start, end, ratio, overlap)
    R, D = kv.shape[1], kv.shape[2] // (1 + overlap)
    newest, first = end[:, None] - 1, start[:, None] // ratio * ratio
    position = newest - (newest - jnp.arange(R)) % R
    is_own = (position >= first) & (position < first + ratio)
    is_before = overlap & (position >= jnp.maximum(first - ratio, 0)) & (position < first)
    halves = lambda ring: jnp.where(is_own[..., None], ring[..., -D:], ring[..., :D])
    counts = ((is_own | is_before) & (first + ratio <= end[:, None]))[..., None]
    # Not -inf: the softmax of no row at all is finite so, and its gradient.
    weights = jax.nn.softmax(jnp.where(counts, halves(gate), jnp.finfo(jnp.float32).min), axis=1)
    return jnp.sum(jnp.where(counts, weights * jnp.where(counts, halves(kv), 0), 0), axis=1).astype(dtype)
