"""Prefill in fixed chunks and the decode loop, as pure functions of a model: what `api.py` compiles."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dsv4_jax.cache import Cache
from dsv4_jax.generate.sampling import Sampler, step_keys
from dsv4_jax.model import DeepseekV4

PREFILL_CHUNK = 512
SMALLEST_BUCKET = 16


def bucket(n: int) -> int:
    """n rounded up to a power of two, at least SMALLEST_BUCKET: what shapes are compiled for."""
    return max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Shapes:
    """The static sizes of one compiled program; prompts of the same bucket share it."""

    prompt: int  # padded prompt length, a multiple of chunk
    new: int  # slots for new tokens
    capacity: int  # tokens the cache can hold

    @property
    def chunk(self) -> int:
        return min(self.prompt, PREFILL_CHUNK)

    @classmethod
    def of(cls, prompt: int, new: int, max_tokens: int) -> Shapes:
        """The buckets of a longest prompt and a number of new tokens that fit into `max_tokens` together."""
        prompt, slots = bucket(prompt), bucket(max(new, 1))
        return cls(prompt, slots, min(prompt + slots, max_tokens))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Between two steps: the last token of each row (not yet in the cache), what is finished, and the cache."""

    token: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]
    step: jax.Array  # int32 [], tokens produced so far
    cache: Cache


def chunks_of(tokens: jax.Array, lengths: jax.Array, index: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """The `index`-th chunk of each row [B, chunk] and how many of its tokens are real [B]."""
    piece = jax.lax.dynamic_slice_in_dim(tokens, index * chunk, chunk, axis=1)
    return piece, jnp.clip(lengths - index * chunk, 0, chunk)


def prefill(model: DeepseekV4, tokens: jax.Array, lengths: jax.Array, shapes: Shapes) -> tuple[jax.Array, Cache]:
    """Right-padded prompts [B, shapes.prompt] -> fp32 logits [B, V] after each row's last token, and the cache."""
    B, chunk = tokens.shape[0], shapes.chunk
    last = jnp.zeros((B, model.config.hc_mult, model.config.hidden_size), model.dtype)

    def run_chunk(carry):
        index, last, cache = carry
        piece, count = chunks_of(tokens, lengths, index, chunk)
        streams, cache = model(piece, cache, count)
        at_end = jnp.take_along_axis(streams, jnp.maximum(count - 1, 0)[:, None, None, None], axis=1)[:, 0]
        ends_here = (lengths - 1) // chunk == index
        return index + 1, jnp.where(ends_here[:, None, None], at_end, last), cache

    carry = (jnp.int32(0), last, model.init_cache(B, shapes.capacity))
    if shapes.prompt == chunk:
        _, last, cache = run_chunk(carry)
    else:
        _, last, cache = jax.lax.while_loop(lambda c: c[0] * chunk < lengths.max(), run_chunk, carry)
    return model.head(last[:, None])[:, 0], cache


def first_token(logits: jax.Array, cache: Cache, sampler: Sampler, keys: jax.Array, stop: jax.Array) -> DecodeState:
    """The state after prefill: the first new token is chosen, nothing of it is in the cache yet."""
    token = sampler(logits, step_keys(keys, jnp.int32(0)))
    return DecodeState(token, jnp.isin(token, stop), jnp.int32(1), cache)


def decode_step(
    model: DeepseekV4, state: DecodeState, sampler: Sampler, keys: jax.Array, stop: jax.Array
) -> DecodeState:
    """One more token for every unfinished row; finished rows keep their cache and yield -1."""
    active = ~state.done
    token = jnp.where(active, state.token, 0)
    streams, cache = model(token[:, None], state.cache, active.astype(jnp.int32))
    chosen = sampler(model.head(streams)[:, 0], step_keys(keys, state.step))
    token = jnp.where(active, chosen, -1)
    return DecodeState(token, state.done | jnp.isin(token, stop), state.step + 1, cache)


def generate_tokens(
    model: DeepseekV4,
    tokens: jax.Array,
    lengths: jax.Array,
    limit: jax.Array,
    sampler: Sampler,
    keys: jax.Array,
    stop: jax.Array,
    shapes: Shapes,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prefill and the whole decode loop on the device; stops early when every row has.

    Args:
      tokens, lengths: int32 [B, shapes.prompt] right-padded, int32 [B].
      limit: int32 [], new tokens wanted, 1 .. shapes.new.
      keys: one PRNG key per row; stop: int32 [K] ids that end a row, padded with -2.
    Returns:
      int32 [B, shapes.new] padded with -1, int32 [B] lengths (the stop id counted), int32 [] decode steps run.
    """
    state = first_token(*prefill(model, tokens, lengths, shapes), sampler, keys, stop)
    out = jnp.full((tokens.shape[0], shapes.new), -1, jnp.int32).at[:, 0].set(state.token)

    def body(carry):
        state, out = carry
        state = decode_step(model, state, sampler, keys, stop)
        return state, out.at[:, state.step - 1].set(state.token)

    state, out = jax.lax.while_loop(lambda c: (c[0].step < limit) & ~c[0].done.all(), body, (state, out))
    return out, (out >= 0).sum(1, dtype=jnp.int32), state.step


def score_tokens(model: DeepseekV4, tokens: jax.Array, lengths: jax.Array, shapes: Shapes) -> jax.Array:
    """fp32 logits [B, shapes.prompt, V] of every position, chunk by chunk through the cache."""

    def run_chunk(cache, index):
        piece, count = chunks_of(tokens, lengths, index, shapes.chunk)
        streams, cache = model(piece, cache, count)
        return cache, model.head(streams)

    cache = model.init_cache(tokens.shape[0], shapes.capacity)
    if shapes.prompt == shapes.chunk:
        return run_chunk(cache, jnp.int32(0))[1]
    _, logits = jax.lax.scan(run_chunk, cache, jnp.arange(shapes.prompt // shapes.chunk))
    return jnp.moveaxis(logits, 0, 1).reshape(*tokens.shape, -1)
