"""The contract of what lies between and behind the products of experts, in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.round_rows.reference import round_rows


def clamped_swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit); the gate has no lower clamp."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def expert_hidden(both: jax.Array, weight: jax.Array | None = None, *, limit: float, rounded: bool) -> jax.Array:
    """What an expert's down projection reads: gate and up joined in fp32, weighted, rounded once.

    Args:
      both: [..., 2 F], gate and up.
      weight: fp32 [..., 1], the routing weight, which goes in before any rounding; rows of none, 0, may hold anything.
      rounded: to FP8 codes and back, too, as `round_rows` does.
    Returns:
      [..., F] in both.dtype. Rows do not depend on each other.
    Source: architecture 6.
    """
    gate, up = jnp.split(both if weight is None else jnp.where(weight != 0, both, 0), 2, axis=-1)
    wide = clamped_swiglu(gate.astype(jnp.float32), up.astype(jnp.float32), limit)
    out = (wide if weight is None else wide * weight).astype(both.dtype)
    return round_rows(out) if rounded else out


def add_rows(products: jax.Array, place: jax.Array) -> jax.Array:
    """The sum of each token's rows, one after another in fp32.

    Args:
      products: [S, M]; rows that no token reads may hold anything.
      place: int32 [n, A] in [0, S), or negative: nothing.
    Returns:
      fp32 [n, M].
    """
    picked = products.at[jnp.maximum(place, 0)].get(mode="clip")
    total = jnp.zeros((place.shape[0], products.shape[1]), jnp.float32)
    for a in range(place.shape[1]):
        total += jnp.where(place[:, a, None] >= 0, picked[:, a], 0)
    return total
