"""Expert dispatch: tokens travel to the shards that hold their experts, and sums come back, all to all.

No token is ever dropped. What a device sends to each of S shards in a round has room for `capacity` tokens; where
routing is so uneven that more want to go to one of them, another round follows. Buffers are therefore bounded, by
2 * S * capacity tokens a device, whatever the imbalance: 6 bytes a channel and token in bfloat16 (the token there,
its fp32 sum back).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.sharding import Parallel

ONE_ROUND = 64  # up to so many tokens a device, a round has room for all of them
MARGIN = 1.25  # room over the mean load

Run = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # tokens [n, M], ids and weights [n, A] -> fp32 [n, M]


def capacity(tokens: int, choices: int, shards: int) -> int:
    """Tokens that one device can send to one shard in a round."""
    if tokens <= ONE_ROUND:
        return tokens
    share = 1 - (1 - 1 / shards) ** choices  # of the tokens have an expert on a given shard, were routing even
    return min(tokens, 8 * math.ceil(tokens * share * MARGIN / 8))


def local_ids(index: jax.Array, first: jax.Array | int, held: int) -> jax.Array:
    """Expert ids as this device counts its own: 0 .. held - 1, and `held` for those of others."""
    index = index - first
    return jnp.where((index >= 0) & (index < held), index, held)


class Queues(NamedTuple):
    """Who goes where: order int32 [S, n], tokens that want to go to each shard first; place [n, S]; length [S]."""

    order: jax.Array
    place: jax.Array
    length: jax.Array
    wanted: jax.Array  # bool [n, S]


def queue(index: jax.Array, real: jax.Array, shards: int, per_shard: int) -> Queues:
    """Expert ids [n, A] and which tokens are real [n] -> a queue of tokens for each shard, each token once."""
    owner = index // per_shard
    wanted = (owner[..., None] == jnp.arange(shards)).any(1) & real[:, None]
    order = jnp.argsort(~wanted, axis=0, stable=True).T
    return Queues(order, jnp.cumsum(wanted, axis=0) - 1, wanted.sum(0), wanted)


def run_experts(
    x: jax.Array, index: jax.Array, weights: jax.Array, real: jax.Array, experts: int, parallel: Parallel, run: Run
) -> jax.Array:
    """The routed experts' sum for this device's tokens, wherever their experts are.

    Args:
      x: [n, M] this device's tokens (the same along `model`); index, weights: [n, A] ids 0 .. experts - 1 and weights.
      real: bool [n]; others are not sent and get zeros.
      run: sums the products of the experts held here; ids past theirs are to be skipped.
    Returns:
      fp32 [n, M]; along `model`, the part that each device's own experts give, to be added up.
    """
    held = experts // parallel.expert_shards
    mine = parallel.model_index() * held
    if parallel.expert == 1:
        return run(x, jnp.where(real[:, None], local_ids(index, mine, held), held), weights)
    shards, per_shard = parallel.expert, experts // parallel.expert
    room = capacity(index.shape[0], index.shape[1], shards)
    queues = queue(index, real, shards, per_shard)
    rounds = parallel.largest(-(-queues.length.max() // room))
    swap = lambda a: jax.lax.all_to_all(a, "expert", split_axis=0, concat_axis=0)

    def exchange(number: jax.Array, out: jax.Array) -> jax.Array:
        slot = number * room + jnp.arange(room)
        token = queues.order.at[:, slot].get(mode="clip")
        sent = slot < queues.length[:, None]
        there = index[token] - per_shard * jnp.arange(shards)[:, None, None]  # ids as the shard counts them
        ids = swap(jnp.where(sent[..., None], there, per_shard))
        tokens, share = swap(x[token]), swap(weights[token])
        flat = lambda a: a.reshape(shards * room, -1)
        sums = run(flat(tokens), local_ids(flat(ids), mine, held), flat(share))
        return _collect(out, swap(sums.reshape(shards, room, -1)), queues, number * room)

    zeros = jnp.zeros(x.shape, jnp.float32)
    if room == x.shape[0]:
        return exchange(jnp.int32(0), zeros)
    return jax.lax.fori_loop(0, rounds, exchange, zeros)


def _collect(out: jax.Array, sums: jax.Array, queues: Queues, first: jax.Array) -> jax.Array:
    """Add what came back, sums [S, room, M] of places first .., to out [n, M], in the order of shards."""
    room = sums.shape[1]

    def add(out, shard):
        sums, place, wanted = shard
        here = wanted & (place >= first) & (place < first + room)
        return out + jnp.where(here[:, None], sums.at[place - first].get(mode="clip"), 0), None

    return jax.lax.scan(add, out, (sums, queues.place.T, queues.wanted.T))[0]
