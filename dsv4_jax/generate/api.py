"""The library's front door: checks what is asked, compiles once per bucket of shapes, and gives back host arrays."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.generate import decode
from dsv4_jax.generate.decode import Shapes
from dsv4_jax.generate.sampling import Greedy, Sampler, row_keys
from dsv4_jax.model import DeepseekV4
from dsv4_jax.quantized import expand, expanded_bytes

EXPAND_BYTES = 64 << 20  # bound on the expanded weights of a model that is expanded once per call
IN_FLIGHT = 2  # decode steps dispatched before the oldest is fetched


@dataclass(frozen=True)
class Stats:
    """What a run did. `seconds` is wall time, compilation included in the first run of its shapes; `accepted` counts
    accepted drafts by draft position (empty without drafts)."""

    prompt_tokens: int
    new_tokens: int
    steps: int
    seconds: float
    drafted: int = 0
    accepted: tuple[int, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class Generation:
    """tokens: int32 [B, max_new_tokens], -1 after a row's end; lengths: int32 [B], the stop id counted; stats."""

    tokens: np.ndarray
    lengths: np.ndarray
    stats: Stats


@dataclass(frozen=True)
class StreamEvent:
    """One step: int32 [B] tokens (-1 for rows that ended before) and which rows have ended, this token included."""

    step: int
    tokens: np.ndarray
    done: np.ndarray


class _Structure:
    """A model's tree structure as a static argument; equality is decided by identity first, being asked every step."""

    def __init__(self, treedef):
        self.treedef, self._hash = treedef, hash(treedef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        return self is other or (isinstance(other, _Structure) and self.treedef == other.treedef)


def _split(model: DeepseekV4) -> tuple[_Structure, list[jax.Array]]:
    leaves, treedef = jax.tree.flatten(model)
    return _Structure(treedef), leaves


def _ready(model: DeepseekV4) -> tuple[_Structure, list[jax.Array]]:
    """The model as compiled programs take it.

    A small quantised model spends more time on expanding its weights at each step than on reading them, so it is
    expanded once per call.
    """
    if model.kernels.reads_packed or not 0 < expanded_bytes(model, model.dtype) <= EXPAND_BYTES:
        return _split(model)
    return _split(_expand(*_split(model)))


def _compiled(static: tuple[str, ...] = (), donate: tuple[str, ...] = ()):
    """jit a function of a model, given as its structure and its arrays."""

    def wrap(function):
        @functools.wraps(function)
        def call(structure, leaves, *args, **kwargs):
            return function(jax.tree.unflatten(structure.treedef, leaves), *args, **kwargs)

        return jax.jit(call, static_argnums=0, static_argnames=static, donate_argnames=donate)

    return wrap


@_compiled()
def _expand(model):
    return expand(model, model.dtype)


_generate = _compiled(static=("shapes",))(decode.generate_tokens)
_score = _compiled(static=("shapes",))(decode.score_tokens)


@_compiled(static=("shapes",))
def _start(model, tokens, lengths, sampler, keys, stop, *, shapes):
    return decode.first_token(*decode.prefill(model, tokens, lengths, shapes), sampler, keys, stop)


@_compiled(donate=("cache",))
def _step(model, token, done, step, sampler, keys, stop, *, cache):
    # token and done are fetched while the next step runs, so only the cache may be donated.
    return decode.decode_step(model, decode.DecodeState(token, done, step, cache), sampler, keys, stop)


def logits(model: DeepseekV4, tokens, lengths=None) -> jax.Array:
    """Next-token logits at every position.

    Args:
      tokens: int [B, T] (or [T]), right-padded.
      lengths: int [B], tokens that are real; default all. Logits of padding mean nothing.
    Returns:
      fp32 [B, T, V].
    Raises:
      ValueError: nothing to score, an id outside the vocabulary, or more tokens than the cache holds.
    """
    tokens, lengths = _check_prompts(model, tokens, lengths)
    _check_room(model, lengths, 0)
    shapes = Shapes.of(tokens.shape[1], 0, model.max_tokens)
    out = _score(*_ready(model), _pad(tokens, shapes.prompt), lengths, shapes=shapes)
    return out[:, : tokens.shape[1]]


def generate(
    model: DeepseekV4,
    tokens,
    *,
    lengths=None,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] = (),
    drafts: int = 0,
) -> Generation:
    """Continue prompts in one compiled call: prefill in chunks, then a decode loop on the device.

    Args:
      tokens: int [B, T] (or [T]), right-padded; rows are independent of each other.
      lengths: int [B], true prompt lengths; default all T.
      max_new_tokens: at most so many new tokens per row.
      sampler: `Greedy()` (default) or `Sample(...)`.
      seed: one seed, from which each row draws its own stream, or one seed per row [B].
      stop_ids: ids that end a row; the stop id itself is returned.
      drafts: speculative drafts per step; only 0 is available in this version.
    Raises:
      ValueError: before any work, for anything that does not fit; the message says what to change.
    """
    request = _Request.make(model, tokens, lengths, max_new_tokens, sampler, seed, stop_ids, drafts)
    began = time.perf_counter()
    out, counts, steps = _generate(
        *_ready(model), *request.prompts, np.int32(max_new_tokens), *request.choice, shapes=request.shapes
    )
    out, counts, steps = jax.device_get((out, counts, steps))
    seconds = time.perf_counter() - began
    stats = Stats(int(request.prompts[1].sum()), int(counts.sum()), int(steps), seconds)
    return Generation(out[:, :max_new_tokens], counts, stats)


def stream(
    model: DeepseekV4,
    tokens,
    *,
    lengths=None,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] = (),
    drafts: int = 0,
) -> Iterator[StreamEvent]:
    """As `generate`, token by token over the same step; yields a StreamEvent per step while the next ones run."""
    request = _Request.make(model, tokens, lengths, max_new_tokens, sampler, seed, stop_ids, drafts)
    return _events(model, request, max_new_tokens)


def _events(model: DeepseekV4, request: _Request, limit: int) -> Iterator[StreamEvent]:
    parts = _ready(model)
    state = _start(*parts, *request.prompts, *request.choice, shapes=request.shapes)
    queue = collections.deque([(0, state.token, state.done)])
    for dispatched in range(1, limit + IN_FLIGHT):
        if dispatched < limit:
            state = _step(*parts, state.token, state.done, state.step, *request.choice, cache=state.cache)
            state.token.copy_to_host_async()
            queue.append((dispatched, state.token, state.done))
        if queue and (dispatched >= IN_FLIGHT or dispatched >= limit - 1):
            step, token, done = queue.popleft()
            event = StreamEvent(step, np.asarray(token), np.asarray(done))
            yield event
            if event.done.all():
                return


@dataclass(frozen=True)
class _Request:
    """A checked request: padded prompts with their lengths, how tokens are chosen, and the shapes to compile for."""

    prompts: tuple[np.ndarray, np.ndarray]
    choice: tuple[Sampler, jax.Array, np.ndarray]  # sampler, keys, stop ids
    shapes: Shapes

    @classmethod
    def make(cls, model, tokens, lengths, max_new_tokens, sampler, seed, stop_ids, drafts) -> _Request:
        tokens, lengths = _check_prompts(model, tokens, lengths)
        if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer of at least 1")
        if drafts:
            raise ValueError(f"drafts={drafts}: speculative decoding is not available in this version; use drafts=0")
        sampler = Greedy() if sampler is None else sampler
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler={sampler!r} must be a Sampler such as Greedy() or Sample(temperature=0.7)")
        _check_room(model, lengths, int(max_new_tokens))
        stop = np.asarray(list(stop_ids), np.int64)
        _check_ids(model, stop, "stop_ids")
        stop = np.concatenate([stop, np.full(8 - len(stop) % 8, -2)]).astype(np.int32)
        shapes = Shapes.of(tokens.shape[1], int(max_new_tokens), model.max_tokens)
        keys = row_keys(_check_seed(seed, len(tokens)), len(tokens))
        return cls((_pad(tokens, shapes.prompt), lengths), (sampler, keys, stop), shapes)


def _check_prompts(model: DeepseekV4, tokens, lengths) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, T] with padding zeroed, and int32 [B] lengths in 1 .. T."""
    tokens = np.asarray(tokens)
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, T], got shape {tokens.shape}")
    if 0 in tokens.shape:
        raise ValueError(f"empty prompt: tokens has shape {tokens.shape}; give every row at least one token")
    B, T = tokens.shape
    lengths = np.full((B,), T) if lengths is None else np.asarray(lengths)
    if lengths.shape != (B,) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths must be {B} integers, got shape {lengths.shape} of {lengths.dtype}")
    if lengths.min() < 1 or lengths.max() > T:
        row = int(np.argmax((lengths < 1) | (lengths > T)))
        kind = "empty prompt" if lengths[row] < 1 else "length past the end"
        raise ValueError(f"{kind}: lengths[{row}]={lengths[row]} must be between 1 and {T}")
    real = np.arange(T) < lengths[:, None]
    _check_ids(model, tokens[real], "tokens")
    return np.where(real, tokens, 0).astype(np.int32), lengths.astype(np.int32)


def _pad(tokens: np.ndarray, width: int) -> np.ndarray:
    return np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))


def _check_ids(model: DeepseekV4, ids: np.ndarray, name: str) -> None:
    bad = ids[(ids < 0) | (ids >= model.config.vocab_size)]
    if bad.size:
        raise ValueError(f"{name}: id {int(bad[0])} is outside the vocabulary 0 .. {model.config.vocab_size - 1}")


def _check_room(model: DeepseekV4, lengths: np.ndarray, new: int) -> None:
    if lengths.max() + new > model.max_tokens:
        wanted = f"{lengths.max()} prompt tokens" + (f" + {new} new ones" if new else "")
        raise ValueError(
            f"{wanted} do not fit the cache of {model.max_tokens}; "
            f"load the model with max_tokens={lengths.max() + new} or more"
        )


def _check_seed(seed, rows: int) -> jax.Array:
    seed = np.asarray(seed)
    if not np.issubdtype(seed.dtype, np.integer) or seed.shape not in ((), (rows,)):
        raise ValueError(f"seed must be one integer or {rows} of them, got {seed!r}")
    return jnp.asarray(seed & 0xFFFFFFFF, jnp.uint32)
