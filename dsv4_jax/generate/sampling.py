"""Samplers: small pytrees, so that a new temperature is a new argument and not a new program."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp


class Sampler(abc.ABC):
    """Chooses one token per row."""

    @abc.abstractmethod
    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """fp32 [B, V] and one PRNG key per row [B] -> int32 [B]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Greedy(Sampler):
    """The largest logit; the lower id wins a tie."""

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sample(Sampler):
    """A draw from softmax(logits / temperature), restricted by whichever filters are given, in this order.

    Args:
      temperature: > 0; 1.0 is the model's own distribution.
      top_k: keep the k largest logits.
      top_p: of those, keep the fewest whose probabilities reach p (the one that crosses p included).
      min_p: of those, keep tokens at least min_p times as probable as the most probable.
    Raises:
      ValueError: a value out of range.
    """

    temperature: float | jax.Array = 1.0
    top_k: int | jax.Array | None = None
    top_p: float | jax.Array | None = None
    min_p: float | jax.Array | None = None

    def __post_init__(self):
        in_range = {
            "temperature": lambda v: v > 0,
            "top_k": lambda v: v >= 1,
            "top_p": lambda v: 0 < v <= 1,
            "min_p": lambda v: 0 <= v <= 1,
        }
        for name, check in in_range.items():
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not check(value):
                limit = {"temperature": "> 0 (use Greedy() for 0)", "top_k": ">= 1"}.get(name, "between 0 and 1")
                raise ValueError(f"{name}={value} must be {limit}")

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        logits = self.filtered(logits.astype(jnp.float32) / self.temperature)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def filtered(self, logits: jax.Array) -> jax.Array:
        """fp32 [B, V] with -inf for every token that the filters exclude."""
        if self.top_k is None and self.top_p is None and self.min_p is None:
            return logits
        order = jnp.argsort(-logits, axis=-1, stable=True)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        rank = jnp.arange(logits.shape[-1])
        if self.top_k is not None:
            ranked = jnp.where(rank < self.top_k, ranked, -jnp.inf)
        if self.top_p is not None:
            probability = jax.nn.softmax(ranked, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            ranked = jnp.where((before < self.top_p) | (rank == 0), ranked, -jnp.inf)
        if self.min_p is not None:
            probability = jax.nn.softmax(ranked, axis=-1)
            ranked = jnp.where(probability >= self.min_p * probability[..., :1], ranked, -jnp.inf)
        return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def row_keys(seed: jax.Array, rows: int) -> jax.Array:
    """PRNG keys [B]. One seed int32 [] is split by row; int32 [B] gives every row its own, as if it ran alone."""
    if seed.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    return jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), 0))(seed)


def token_keys(keys: jax.Array, index: jax.Array) -> jax.Array:
    """The keys [B] of each row's new token number index, int32 [B]."""
    return jax.vmap(jax.random.fold_in)(keys, index)
