"""The deterministic mode: every product sees one sequence and a fixed number of tokens, whatever else there is to do.

How a matrix product is split, and so how its sums round, depends on how many rows it has. Here a row's results are the
same bits alone and in a batch of any size, on one device and on any number of `data` shards, with drafts and without.
The price is a step that takes as long as its rows and tokens one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.cache import Cache
from dsv4_jax.model import DeepseekV4

PIECE = 16  # tokens of a prompt at a time; every chunk is a multiple of it


def continue_alone(
    model: DeepseekV4, tokens: jax.Array, cache: Cache, count: jax.Array, piece: int
) -> tuple[jax.Array, Cache]:
    """`model(tokens, cache, count)`, `piece` tokens of one row at a time; see `DeepseekV4.__call__`."""
    B, T = tokens.shape
    config = model.config
    streams = jnp.zeros((B, T, config.hc_mult, config.hidden_size), model.dtype)

    def run(row, start, carry):
        streams, cache = carry
        part = jax.lax.dynamic_slice(tokens, (row, start), (1, piece))
        state = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), cache)
        out, state = model(part, state, jnp.clip(count[row] - start, 0, piece)[None])
        put = lambda whole, one: jax.lax.dynamic_update_slice_in_dim(whole, one, row, 0)
        return jax.lax.dynamic_update_slice(streams, out, (row, start, 0, 0)), jax.tree.map(put, cache, state)

    return _each(B, T, piece, count, run, (streams, cache))


def head_alone(model: DeepseekV4, streams: jax.Array) -> jax.Array:
    """`model.head(streams)`, a token of one row at a time: [B, T, N, M] -> fp32 [B, T, V]."""
    B, T = streams.shape[:2]

    def run(row, start, logits):
        part = jax.lax.dynamic_slice(streams, (row, start, 0, 0), (1, 1, *streams.shape[2:]))
        return jax.lax.dynamic_update_slice(logits, model.head(part), (row, start, 0))

    logits = jnp.zeros((B, T, model.config.vocab_size), jnp.float32)
    return _each(B, T, 1, jnp.full((B,), T), run, logits)


def _each(rows: int, tokens: int, piece: int, count: jax.Array, run: Callable[..., Any], carry: Any) -> Any:
    """run(row, first token, carry) for each row's pieces. The number of turns is not known to the compiler, which would
    otherwise write a single turn out and fuse it, and so round it, differently."""
    pieces = tokens // piece
    turns = jnp.where(count.min() < 0, 0, rows * pieces)
    turn = lambda i, carry: run(i // pieces, i % pieces * piece, carry)
    return jax.lax.fori_loop(0, turns, turn, carry)
