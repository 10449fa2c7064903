"""Rows put into arrays, plainly: the contract of the kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def put_rows(held: Any, rows: Any, index: jax.Array) -> Any:
    """The arrays [B, S, W] of `held` with those of `rows`, [B, K, W] each, at `index`.

    Args:
      held, rows: pytrees of the same structure and dtypes; widths may differ from leaf to leaf.
      index: int32 [B, K], distinct in each row but for those of at least S, which are dropped.
    """
    slots = jax.tree.leaves(held)[0].shape[1]
    index = jnp.where(index < slots, index, slots + jnp.arange(index.shape[1]))  # all distinct
    if index.size == 1:  # XLA:CPU makes one update a slice put back, fuses it twice and so copies all of `held`
        rows = jax.tree.map(lambda new: jnp.repeat(new, 2, axis=1), rows)
        index = jnp.concatenate([index, jnp.full_like(index, slots + 1)], axis=1)
    put = jax.vmap(lambda old, new, at: old.at[at].set(new, mode="drop", unique_indices=True))
    return jax.tree.map(lambda old, new: put(old, new, index), held, rows)
