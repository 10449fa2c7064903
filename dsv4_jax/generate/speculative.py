"""Drafts: the MTP layers guess the next tokens, the main model checks them all in one step (architecture 7).

A draft only decides how many tokens a step yields, never which: the main model chooses every token, with the same
sampler and the same key as without drafts. Drafts are chosen with those keys too, so a sampled draft shares its
randomness with the token that it guesses, and is right as often as the two distributions agree.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.cache import LayerCache
from dsv4_jax.generate.sampling import Sampler, token_keys
from dsv4_jax.model import DeepseekV4

MAX_DRAFTS = 8


def choose(logits: jax.Array, sampler: Sampler, keys: jax.Array, first: jax.Array) -> jax.Array:
    """fp32 logits [B, T, V] of new tokens first .. first + T - 1 of each row -> int32 [B, T]."""
    B, T, V = logits.shape
    index = (first[:, None] + jnp.arange(T)).reshape(-1)
    return sampler(logits.reshape(B * T, V), token_keys(jnp.repeat(keys, T), index)).reshape(B, T)


class Drafter(abc.ABC):
    """Guesses tokens. What it remembers between steps is a pytree of its own making."""

    count: int  # drafts per step

    @abc.abstractmethod
    def init(self, model: DeepseekV4, batch: int) -> Any:
        """Its memory before the first token."""

    @abc.abstractmethod
    def observe(self, model: DeepseekV4, memory: Any, streams, following, start, count) -> tuple[Any, Any]:
        """Take in committed tokens: their streams [B, T, N, M] at start .. start + count - 1, and what follows each.

        -> the memory, and whatever `propose` wants to know of the last of them.
        """

    @abc.abstractmethod
    def propose(self, model: DeepseekV4, memory: Any, seen: Any, end, sampler, keys, first) -> tuple[jax.Array, Any]:
        """Guess new tokens first .. first + count - 1 of each row, whose cache ends at `end`: int32 [B, count]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MtpMemory:
    """caches: of the MTP layers in use; last: [B, N, M] a layer, its output at the last committed position."""

    caches: tuple[LayerCache, ...]
    last: tuple[jax.Array, ...]


@dataclass(frozen=True)
class MtpDrafter(Drafter):
    """The checkpoint's own MTP layers, draft j by layer j mod their number, chained by their streams.

    Rows of drafts lie past the cursor of each layer's ring, where the next committed rows replace them: what a layer
    keeps comes from the main model's streams alone.
    """

    count: int

    def _layers(self, model: DeepseekV4) -> int:
        return min(self.count, len(model.mtp))

    def init(self, model: DeepseekV4, batch: int) -> MtpMemory:
        layers = self._layers(model)
        blank = jnp.zeros((batch, model.config.hc_mult, model.config.hidden_size), model.dtype)
        return MtpMemory(model.init_mtp_cache(batch, drafts=self.count)[:layers], (blank,) * layers)

    def observe(self, model, memory, streams, following, start, count):
        caches, last = list(memory.caches), list(memory.last)
        for i in range(len(caches)):
            before = streams if i == 0 else jnp.concatenate([memory.last[i - 1][:, None], streams[:, :-1]], axis=1)
            streams, caches[i] = model.draft(i, before, following, caches[i], start, count)
            newest = jnp.take_along_axis(streams, jnp.maximum(count - 1, 0)[:, None, None, None], axis=1)[:, 0]
            last[i] = jnp.where((count > 0)[:, None, None], newest, last[i])
        return MtpMemory(tuple(caches), tuple(last)), None

    def propose(self, model, memory, seen, end, sampler, keys, first):
        caches, drafts = list(memory.caches), list[jax.Array]()
        streams, ones = memory.last[0][:, None], jnp.ones_like(end)
        for j in range(self.count):
            layer = j % len(caches)
            if j:
                streams, caches[layer] = model.draft(layer, streams, drafts[-1], caches[layer], end - 1 + j, ones)
            drafts.append(choose(model.draft_head(layer, streams), sampler, keys, first + j))
        return jnp.concatenate(drafts, axis=1), MtpMemory(tuple(caches), memory.last)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafts:
    """Between two steps: the drafts of each row, the drafter's memory, and how often each position was right so far."""

    tokens: jax.Array  # int32 [B, K]
    memory: Any
    accepted: jax.Array  # int32 [B, K]
    offered: jax.Array  # int32 [B], steps in which drafts were checked


def count_accepted(drafts: jax.Array, chosen: jax.Array) -> jax.Array:
    """Drafts [B, K] and the tokens chosen [B, K + 1] -> int32 [B]: how many leading drafts are right."""
    return jnp.cumprod(drafts == chosen[:, :-1], axis=1, dtype=jnp.int32).sum(1)


def first_drafts(model, drafter: Drafter, memory, streams, token, end, sampler, keys) -> Drafts:
    """After prefill: `streams` [B, N, M] of the last prompt token, the first new `token` [B], prompts of length end."""
    one = jnp.ones_like(end)
    memory, seen = drafter.observe(model, memory, streams[:, None], token[:, None], end - 1, one)
    tokens, memory = drafter.propose(model, memory, seen, end, sampler, keys, one)
    return Drafts(tokens, memory, jnp.zeros(tokens.shape, jnp.int32), jnp.zeros_like(end))


def next_drafts(model, drafter: Drafter, drafts: Drafts, streams, chosen, kept, start, sampler, keys, first) -> Drafts:
    """After a step at `start` that gave `streams` [B, K + 1, N, M] and `chosen` [B, K + 1], of which `kept` count."""
    memory, seen = drafter.observe(model, drafts.memory, streams, chosen, start, kept)
    tokens, memory = drafter.propose(model, memory, seen, start + kept, sampler, keys, first)
    right = jnp.arange(drafter.count) < count_accepted(drafts.tokens, chosen)[:, None]
    active = kept > 0
    return Drafts(tokens, memory, drafts.accepted + (right & active[:, None]), drafts.offered + active)
