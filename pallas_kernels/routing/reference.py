"""The contract of routing, in plain jnp: the choice of experts, and choices sorted into blocks of one expert each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


def routing_weights(scores: jax.Array, index: jax.Array, factor: float) -> jax.Array:
    """Un-biased scores of the chosen experts, normalised to sum to `factor`."""
    chosen = jnp.take_along_axis(scores, index, axis=-1)
    return chosen / chosen.sum(-1, keepdims=True) * factor


def route(scores: jax.Array, bias: jax.Array, *, top_k: int, factor: float) -> tuple[jax.Array, jax.Array]:
    """The experts of the largest biased scores, largest first; the lower id wins a tie.

    Args:
      scores: fp32 [n, E]; bias: fp32 [E], which chooses but does not weigh.
    Returns:
      ids int32 [n, A] and their fp32 weights [n, A], which sum to `factor`.
    Source: architecture 6.
    """
    index = jax.lax.top_k(scores + bias, top_k)[1]
    return index, routing_weights(scores, index, factor)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """Pairs (token, choice) sorted by expert and cut into blocks of R rows, none of which spans two experts.

    expert [K]: expert of each block; pair [K, R]: which pair sits in each row (P = none);
    used: how many blocks have rows; slot [P]: the row, counted over all blocks, where each pair went.
    """

    expert: jax.Array
    pair: jax.Array
    used: jax.Array
    slot: jax.Array


def count_blocks(pairs: int, experts: int, rows: int, multiple: int) -> int:
    """Blocks that are always enough; more than `multiple` are filled up to a multiple of it."""
    most = min(pairs, pairs // rows + min(pairs, experts))
    return most if most <= multiple else -(-most // multiple) * multiple


def compare_blocks(index: jax.Array, experts: int, rows: int, multiple: int = 1) -> Blocks:
    """Expert ids [P] -> Blocks, for few pairs: each sum compares all with all, and is one small program of a TPU;
    sorts, gathers and running sums would be thirty. Ids past the experts are in no block."""
    P, block = index.shape[0], jnp.arange(count_blocks(index.shape[0], experts, rows, multiple))
    pairs, every = jnp.arange(P), jnp.arange(experts)
    rank = ((index[:, None] == index) & (pairs < pairs[:, None])).sum(1)
    blocks_of = -(-(index == every[:, None]).sum(1) // rows)
    last_block = jnp.where(every <= every[:, None], blocks_of, 0).sum(1)
    slot = jnp.where(every < index[:, None], blocks_of, 0).sum(1) * rows + rank
    expert = jnp.minimum((last_block <= block[:, None]).sum(1), experts - 1)
    here = jnp.where(index < experts, slot, -1) == (block[:, None] * rows + jnp.arange(rows))[..., None]
    return Blocks(expert, jnp.where(here, pairs, P).min(-1), last_block[-1], slot)


def by_expert(index: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token's choices [n, A] in the order of their experts, and their weights; equal ids keep theirs."""
    before = jnp.tril(jnp.ones((index.shape[1],) * 2, bool), -1)
    mine, other = index[:, :, None], index[:, None, :]
    rank = ((other < mine) | ((other == mine) & before)).sum(2)
    goes = rank[:, None, :] == jnp.arange(index.shape[1])[:, None]  # [n, place, choice]
    place = lambda a: jnp.where(goes, a[:, None, :], 0).sum(2)
    return place(index), place(weights)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertRows:
    """What the products of sorted pairs read: K blocks of R rows, each block of one expert.

    expert int32 [K], used int32 []: a block's expert, and how many blocks have rows.
    token int32 [K R], weight fp32 [K R, 1]: of each row; n and 0 where no pair sits.
    place int32 [n, A]: the rows of a token's pairs, in the order of their experts; -1 for those of no block.
    """

    expert: jax.Array
    used: jax.Array
    token: jax.Array
    weight: jax.Array
    place: jax.Array


def arrange_pairs(
    index: jax.Array,
    weights: jax.Array,
    *,
    experts: int,
    rows: int,
    multiple: int = 1,
    make: Callable[[jax.Array, int, int, int], Blocks] = compare_blocks,
) -> ExpertRows:
    """Each token's choices sorted by expert and cut into blocks of one expert's rows.

    Args:
      index: int32 [n, A] expert ids; those of at least `experts` are held elsewhere and get no row.
      weights: fp32 [n, A].
      rows: R, rows of a block; multiple: see `count_blocks`.
      make: sorts ids [P] into `Blocks`.
    """
    n, A = index.shape
    index, weights = by_expert(index, weights)
    blocks = make(index.reshape(-1), experts, rows, multiple)
    pair = blocks.pair.reshape(-1)
    chosen, real = jnp.minimum(pair, n * A - 1), pair < n * A
    weight = jnp.where(real, weights.reshape(-1)[chosen], 0)[:, None]
    place = jnp.where(index < experts, blocks.slot.reshape(n, A), -1)
    return ExpertRows(blocks.expert, blocks.used, jnp.where(real, chosen // A, n), weight, place)
