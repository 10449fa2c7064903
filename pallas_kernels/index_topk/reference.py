"""The contract of the indexer's selection, in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_mla.reference import Indices


def index_scores(q: jax.Array, weights: jax.Array, keys: jax.Array) -> jax.Array:
    """sum_h weights_h relu(q_h . k_i): q [B, T, H, D], weights [B, T, H], keys [B, N, D] -> fp32 [B, T, N]."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    keys = keys.astype(q.dtype)
    dots = jnp.einsum("BTHD,BND->BTHN", q, keys, precision=precision, preferred_element_type=jnp.float32)
    return jnp.einsum("BTHN,BTH->BTN", jax.nn.relu(dots), weights.astype(jnp.float32), precision="highest")


def check_shapes(op: str, q, weights, keys, visible) -> None:
    """Raise a ValueError that names `op` unless the operands of `pick_entries` fit each other."""
    B, T, H, D = q.shape
    if weights.shape != (B, T, H) or visible.shape != (B, T) or keys.shape[::2] != (B, D):
        raise ValueError(
            f"{op}: q {q.shape} does not fit weights {weights.shape}, keys {keys.shape} or visible {visible.shape}"
        )


def pick_entries(q, weights, keys, visible, *, top_k: int) -> Indices:
    """The `top_k` best-scoring of the first `visible` entries; the lower index wins a tie.

    Args:
      q: [B, T, H, D] index queries, rotated.
      weights: [B, T, H], scaled; may be negative.
      keys: [B, N, D]; entries past `visible` may hold anything finite.
      visible: int32 [B, T].
      top_k: entries to pick; where fewer are visible, all of them.
    Returns:
      Indices int32 [B, T, min(top_k, N)], best first, padded with -1.
    Source: architecture 5.
    """
    hidden = jnp.arange(keys.shape[1]) >= visible[..., None]
    scores = jnp.where(hidden, -jnp.inf, index_scores(q, weights, keys))
    best, index = jax.lax.top_k(scores, min(top_k, keys.shape[1]))
    return Indices(jnp.where(best == -jnp.inf, -1, index))
