"""Prefill in fixed chunks and the decode loop, as pure functions of a model: what `api.py` compiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.cache import Cache
from dsv4_jax.generate.alone import PIECE, continue_alone, head_alone
from dsv4_jax.generate.sampling import Sampler
from dsv4_jax.generate.speculative import Drafter, Drafts, choose, count_accepted, first_drafts, next_drafts
from dsv4_jax.kernels import Kernels
from dsv4_jax.model import DeepseekV4

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
    chunk: int  # tokens of a prompt at a time

    @classmethod
    def of(cls, prompt: int, new: int, max_tokens: int, chunk: int = Kernels.prefill_chunk) -> Shapes:
        """The buckets of a longest prompt and a number of new tokens that fit into `max_tokens` together."""
        prompt, slots = bucket(prompt), bucket(max(new, 1))
        return cls(prompt, slots, min(prompt + slots, max_tokens), min(prompt, chunk))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Between two steps: the last token of each row (not yet in the cache), what is finished, the cache, the drafts."""

    token: jax.Array  # int32 [B]
    done: jax.Array  # bool [B]
    produced: jax.Array  # int32 [B], new tokens so far
    cache: Cache
    drafts: Drafts | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompted:
    """What prefill leaves: logits fp32 [B, V] and streams [B, N, M] after each prompt, cache, the drafter's memory."""

    logits: jax.Array
    streams: jax.Array
    cache: Cache
    memory: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoded:
    """tokens: int32 [B, shapes.new], -1 after a row's end; lengths: int32 [B]; steps: int32 [], of decoding.

    accepted: int32 [K], how often the draft of each position was right; offered: how often it was checked.
    """

    tokens: jax.Array
    lengths: jax.Array
    steps: jax.Array
    accepted: jax.Array
    offered: jax.Array


def chunks_of(tokens: jax.Array, lengths: jax.Array, index: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """The `index`-th chunk of each row [B, chunk] and how many of its tokens are real [B]."""
    piece = jax.lax.dynamic_slice_in_dim(tokens, index * chunk, chunk, axis=1)
    return piece, jnp.clip(lengths - index * chunk, 0, chunk)


def prefill(
    model: DeepseekV4,
    tokens: jax.Array,
    lengths: jax.Array,
    shapes: Shapes,
    drafter: Drafter | None = None,
    alone: bool = False,
) -> Prompted:
    """Right-padded prompts [B, shapes.prompt], chunk by chunk through the cache and past the drafter."""
    B, chunk = tokens.shape[0], shapes.chunk
    last = jnp.zeros((B, model.config.hc_mult, model.config.hidden_size), model.dtype)
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))

    def run_chunk(carry):
        index, last, cache, memory = carry
        piece, count = chunks_of(tokens, lengths, index, chunk)
        start = cache.length
        if alone:
            streams, cache = continue_alone(model, piece, cache, count, PIECE)
        else:
            streams, cache = model(piece, cache, count, in_loop=model.kernels.loops_over_layers)
        at_end = jnp.take_along_axis(streams, jnp.maximum(count - 1, 0)[:, None, None, None], axis=1)[:, 0]
        ends_here = (lengths - 1) // chunk == index
        if drafter is not None:  # what follows a prompt's last token is not known yet
            after, known = chunks_of(following, lengths - 1, index, chunk)
            memory, _ = drafter.observe(model, memory, streams, after, start, known)
        return index + 1, jnp.where(ends_here[:, None, None], at_end, last), cache, memory

    drafts = 0 if drafter is None else drafter.count
    memory = None if drafter is None else drafter.init(model, B)
    carry = (jnp.int32(0), last, model.init_cache(B, shapes.capacity, drafts=drafts), memory)
    if shapes.prompt == chunk:
        _, last, cache, memory = run_chunk(carry)
    else:
        longest = model.parallel.largest(lengths.max())
        _, last, cache, memory = jax.lax.while_loop(lambda c: c[0] * chunk < longest, run_chunk, carry)
    logits = head_alone(model, last[:, None]) if alone else model.head(last[:, None])
    return Prompted(logits[:, 0], last, cache, memory)


def first_token(
    model: DeepseekV4, prompted: Prompted, sampler: Sampler, keys, stop, limit, drafter: Drafter | None = None
) -> DecodeState:
    """The state after prefill: the first new token is chosen, nothing of it is in the cache yet."""
    end = prompted.cache.length
    token = choose(prompted.logits[:, None], sampler, keys, jnp.zeros_like(end))[:, 0]
    drafts = None
    if drafter is not None:
        drafts = first_drafts(model, drafter, prompted.memory, prompted.streams, token, end, sampler, keys)
    done = jnp.isin(token, stop) | (limit <= 1)
    return DecodeState(token, done, jnp.ones_like(end), prompted.cache, drafts)


def decode_step(
    model: DeepseekV4,
    state: DecodeState,
    sampler: Sampler,
    keys,
    stop,
    limit,
    drafter: Drafter | None = None,
    alone: bool = False,
) -> tuple[DecodeState, jax.Array]:
    """One step for every unfinished row: its last token, and its drafts, go through the model.

    Args:
      keys: one PRNG key per row; stop: int32 [K] ids that end a row; limit: int32 [] or [B], new tokens wanted.
    Returns:
      The state, and the new tokens int32 [B, 1 + drafts], padded with -1. Finished rows keep their cache.
    """
    active, start, drafts = ~state.done, state.cache.length, state.drafts
    tokens = state.token[:, None]
    if drafts is not None:
        tokens = jnp.concatenate([tokens, drafts.tokens], axis=1)
    T = tokens.shape[1]
    tokens, count = jnp.where(active[:, None], tokens, 0), active.astype(jnp.int32) * T
    if alone:
        streams, cache = continue_alone(model, tokens, state.cache, count, 1)
        logits = head_alone(model, streams)
    else:
        streams, cache = model(tokens, state.cache, count)
        logits = model.head(streams)
    chosen = choose(logits, sampler, keys, state.produced)
    right = jnp.zeros_like(start) if drafts is None else count_accepted(drafts.tokens, chosen)
    stops = jnp.isin(chosen, stop)
    before_stop = jnp.where(stops.any(1), jnp.argmax(stops, axis=1), T) + 1
    kept = jnp.where(active, jnp.minimum(jnp.minimum(right + 1, before_stop), limit - state.produced), 0)
    new = jnp.where(jnp.arange(T) < kept[:, None], chosen, -1)
    produced = state.produced + kept
    token = jnp.take_along_axis(chosen, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
    if drafter is not None and drafts is not None:
        drafts = next_drafts(model, drafter, drafts, streams, chosen, kept, start, sampler, keys, produced)
    done = state.done | jnp.isin(token, stop) | (produced >= limit)
    return DecodeState(token, done, produced, Cache(cache.layers, start + kept), drafts), new


def decode_steps(
    model: DeepseekV4, state: DecodeState, sampler, keys, stop, limit, turns, steps: int, drafter=None, alone=False
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """`turns` of `decode_step` (int32 [], 1 .. `steps`), fewer once every row has ended.

    Returns:
      The state; the new tokens of each step int32 [B, steps, 1 + drafts], padded with -1; and whether a row had ended
      after it, bool [B, steps]. Steps that were not run have no meaning.
    """
    run = lambda state: decode_step(model, state, sampler, keys, stop, limit, drafter, alone)
    if steps == 1:
        state, new = run(state)
        return state, new[:, None], state.done[:, None]
    B, width = state.token.shape[0], 1 + (0 if drafter is None else drafter.count)

    def body(carry):
        i, state, new, done, _ = carry
        state, some = run(state)
        more = (i + 1 < turns) & is_unfinished(model, state)
        return i + 1, state, new.at[:, i].set(some), done.at[:, i].set(state.done), more

    new, done = jnp.full((B, steps, width), -1, jnp.int32), jnp.ones((B, steps), bool)
    carry = (jnp.int32(0), state, new, done, is_unfinished(model, state))
    _, state, new, done, _ = jax.lax.while_loop(lambda c: c[4], body, carry)
    return state, new, done


def generate_tokens(
    model: DeepseekV4,
    tokens: jax.Array,
    lengths: jax.Array,
    limit: jax.Array,
    sampler: Sampler,
    keys: jax.Array,
    stop: jax.Array,
    shapes: Shapes,
    drafter: Drafter | None = None,
    alone: bool = False,
) -> Decoded:
    """Prefill and the whole decode loop on the device; stops early when every row has.

    Args:
      tokens, lengths: int32 [B, shapes.prompt] right-padded, int32 [B].
      limit: int32 [] or [B], new tokens wanted, 1 .. shapes.new.
      keys: one PRNG key per row; stop: int32 [K] ids that end a row, padded with -2.
      drafter: who guesses tokens ahead; it changes how long this takes and nothing else.
      alone: the deterministic mode; see `alone.py`.
    """
    prompted = prefill(model, tokens, lengths, shapes, drafter, alone)
    state = first_token(model, prompted, sampler, keys, stop, limit, drafter)
    B = tokens.shape[0]
    out = jnp.full((B, shapes.new), -1, jnp.int32).at[:, 0].set(state.token)

    def body(carry):
        state, out, steps, _ = carry
        after, new = decode_step(model, state, sampler, keys, stop, limit, drafter, alone)
        slot = jnp.where(new >= 0, state.produced[:, None] + jnp.arange(new.shape[1]), shapes.new)
        out = out.at[jnp.arange(B)[:, None], slot].set(new, mode="drop")
        return after, out, steps + 1, is_unfinished(model, after)

    carry = (state, out, jnp.int32(0), is_unfinished(model, state))
    state, out, steps, _ = jax.lax.while_loop(lambda c: c[3], body, carry)
    accepted, offered = jnp.zeros((B, 0), jnp.int32), jnp.zeros((B,), jnp.int32)
    if state.drafts is not None:
        accepted, offered = state.drafts.accepted, state.drafts.offered
    gather, add = model.parallel.gather_rows, model.parallel.sum_rows
    return Decoded(gather(out), gather(state.produced), steps, add(accepted.sum(0)), add(offered.sum()))


def is_unfinished(model: DeepseekV4, state: DecodeState) -> jax.Array:
    """Whether any row of any shard is."""
    return model.parallel.largest((~state.done).any().astype(jnp.int32)) > 0


def score_tokens(model: DeepseekV4, tokens: jax.Array, lengths: jax.Array, shapes: Shapes) -> jax.Array:
    """fp32 logits [B, shapes.prompt, V] of every position, chunk by chunk through the cache."""

    def run_chunk(cache, index):
        piece, count = chunks_of(tokens, lengths, index, shapes.chunk)
        streams, cache = model(piece, cache, count, in_loop=model.kernels.loops_over_layers)
        return cache, model.head(streams)

    cache = model.init_cache(tokens.shape[0], shapes.capacity)
    if shapes.prompt == shapes.chunk:
        return model.parallel.gather_rows(run_chunk(cache, jnp.int32(0))[1])
    _, logits = jax.lax.scan(run_chunk, cache, jnp.arange(shapes.prompt // shapes.chunk))
    return model.parallel.gather_rows(jnp.moveaxis(logits, 0, 1).reshape(*tokens.shape, -1))
