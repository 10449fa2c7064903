"""The library's front door: checks what is asked, compiles once per bucket of shapes, and gives back host arrays."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from dsv4_jax.generate import decode
from dsv4_jax.generate.decode import Shapes
from dsv4_jax.generate.prepare import on_one_cpu, ready
from dsv4_jax.generate.sampling import Greedy, Sampler, row_keys
from dsv4_jax.generate.speculative import MAX_DRAFTS, Drafter, MtpDrafter
from dsv4_jax.model import DeepseekV4

# Of `stream` in one call, on a CPU: a call of 500 arrays takes 4 ms there, to read so many bytes a fifth of a second.
CPU_STEPS, CPU_BYTES = 16, 8 << 30


@dataclass(frozen=True)
class Stats:
    """What a run did.

    steps: passes that yielded tokens, the prefill's included; each later one checked the drafts of unfinished rows.
    seconds: wall time, compilation included in the first run of its shapes.
    drafted: drafts that were checked; accepted: how many of them were right, by their position (empty without drafts).
    """

    prompt_tokens: int
    new_tokens: int
    steps: int
    seconds: float
    drafted: int = 0
    accepted: tuple[int, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of right drafts, by position; a draft after a wrong one counts as wrong."""
        checked = self.drafted // len(self.accepted) if self.accepted else 0
        return tuple(count / checked if checked else 0.0 for count in self.accepted)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that a row gained in a step: 1 + the accepted drafts."""
        return 1 + sum(self.acceptance)

    def to_json(self) -> dict[str, Any]:
        derived = ("tokens_per_second", "acceptance", "tokens_per_step")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class Generation:
    """tokens: int32 [B, max_new_tokens], -1 after a row's end; lengths: int32 [B], the stop id counted; stats."""

    tokens: np.ndarray
    lengths: np.ndarray
    stats: Stats


@dataclass(frozen=True)
class StreamEvent:
    """The next token of each row, int32 [B], and which rows have ended, this token included.

    -1 for rows that ended before; with drafts, also where a row has no token yet: rows then advance unevenly.
    """

    step: int
    tokens: np.ndarray
    done: np.ndarray


def _compiled(rows: Sequence[str], out: Callable[[P], Any] = lambda row: P(), *, donate: Sequence[str] = ()):
    """jit a function of a model, given as its structure and its arrays, over the model's mesh.

    Positional arguments are arrays: those called `rows` are split as the batch is, others are on every device; keyword
    arguments are static. out: how results are laid out, given the layout of rows.
    """

    def wrap(function):
        names = list(inspect.signature(function).parameters)[1:]

        def call(structure, leaves, *args, **static):
            model = jax.tree.unflatten(structure.treedef, leaves)
            parallel = model.parallel
            specs = [parallel.batch_spec if name in rows else P() for name, _ in zip(names, args, strict=False)]
            run = parallel.shard(
                functools.partial(function, **static), (parallel.specs(model), *specs), out(parallel.batch_spec)
            )
            return run(model, *args)

        call.__name__ = function.__name__
        static = [name for name in names if name in ("shapes", "steps", "drafter", "alone")]
        donated = [2 + names.index(name) for name in donate]
        return jax.jit(call, static_argnums=0, static_argnames=static, donate_argnums=donated)

    return wrap


@_compiled(rows=("tokens", "lengths", "limit", "keys"))
def generate_program(model, tokens, lengths, limit, sampler, keys, stop, *, shapes, drafter, alone):
    keys = jax.random.wrap_key_data(keys)
    return decode.generate_tokens(model, tokens, lengths, limit, sampler, keys, stop, shapes, drafter, alone)


@_compiled(rows=("tokens", "lengths"))
def _score(model, tokens, lengths, *, shapes):
    return decode.score_tokens(model, tokens, lengths, shapes)


@_compiled(rows=("tokens", "lengths", "limit", "keys"), out=lambda row: (row, P()))
def _start(model, tokens, lengths, limit, sampler, keys, stop, *, shapes, drafter, alone):
    prompted = decode.prefill(model, tokens, lengths, shapes, drafter, alone)
    keys, gather = jax.random.wrap_key_data(keys), model.parallel.gather_rows
    state = decode.first_token(model, prompted, sampler, keys, stop, limit, drafter)
    return state, (gather(state.token), gather(state.done))


@_compiled(rows=("limit", "keys", "state"), out=lambda row: (row, P()), donate=("state",))
def _steps(model, limit, sampler, keys, stop, turns, state, *, steps, drafter, alone):
    # What the host fetches while the next steps run must not be part of the donated state.
    keys, gather = jax.random.wrap_key_data(keys), model.parallel.gather_rows
    state, new, done = decode.decode_steps(model, state, sampler, keys, stop, limit, turns, steps, drafter, alone)
    return state, (gather(new), gather(done | False))


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
    shapes = Shapes.of(tokens.shape[1], 0, model.max_tokens, model.kernels.prefill_chunk)
    out = _score(*ready(model), *_fill_shards(model, _pad(tokens, shapes.prompt), lengths), shapes=shapes)
    return out[: len(tokens), : tokens.shape[1]]


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
    deterministic: bool = False,
) -> Generation:
    """Continue prompts in one compiled call: prefill in chunks, then a decode loop on the device.

    Args:
      tokens: int [B, T] (or [T]), right-padded; rows are independent of each other.
      lengths: int [B], true prompt lengths; default all T.
      max_new_tokens: at most so many new tokens per row.
      sampler: `Greedy()` (default) or `Sample(...)`.
      seed: one seed, from which each row draws its own stream, or one seed per row [B].
      stop_ids: ids that end a row; the stop id itself is returned.
      drafts: tokens that the MTP layers guess ahead per step, 0 .. 8; more tokens per step where they guess right, the
        same tokens in any case.
      deterministic: the same bits for a row alone and in any batch, with drafts and without, on any number of `data`
        shards; rows and tokens go through the model one after the other.
    Raises:
      ValueError: before any work, for anything that does not fit; the message says what to change.
    """
    request = Request.make(model, tokens, lengths, max_new_tokens, sampler, seed, stop_ids, drafts, deterministic)
    began = time.perf_counter()
    out = generate_program(*request.parts(model), *request.inputs, shapes=request.shapes, **request.how)
    return finish(request, out, max_new_tokens, began)


def finish(request: Request, out: decode.Decoded, max_new_tokens: int, began: float) -> Generation:
    """What a program gave, on the host, without the rows that fill the shards; `began`: when the call did."""
    got: Any = jax.device_get(out)
    seconds, rows = time.perf_counter() - began, request.rows
    lengths, prompts = got.lengths[:rows], request.inputs[1][:rows]
    accepted = tuple(got.accepted.tolist())
    drafted = int(got.offered) * len(accepted)
    stats = Stats(int(prompts.sum()), int(lengths.sum()), 1 + int(got.steps), seconds, drafted, accepted)
    return Generation(got.tokens[:rows, :max_new_tokens], lengths, stats)


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
    deterministic: bool = False,
) -> Iterator[StreamEvent]:
    """As `generate`, token by token over the same step; yields StreamEvents while the next steps run.

    On a CPU they come in bursts of up to CPU_STEPS steps after the first, of fewer the larger the model.
    """
    request = Request.make(model, tokens, lengths, max_new_tokens, sampler, seed, stop_ids, drafts, deterministic)
    return _events(model, request, max_new_tokens)


def _events(model: DeepseekV4, request: Request, limit: int) -> Iterator[StreamEvent]:
    parts, rows = request.parts(model), request.rows
    state, begun = _start(*parts, *request.inputs, shapes=request.shapes, **request.how)
    first, done = (x[:rows] for x in jax.device_get(begun))
    yield StreamEvent(0, first, done)
    steps = steps_a_call(parts[1])
    # The first call is of one step, so that there is something to see.
    sizes = [] if done.all() else [1, *[steps] * -(-(limit - 2) // steps)]
    asked = iter(sizes)
    call = lambda state: _steps(*parts, *request.inputs[2:], np.int32(next(asked)), state, steps=steps, **request.how)
    number = 1
    for turns, (new, ended) in zip(sizes, model.schedule.run(call, state, len(sizes)), strict=True):
        for i in range(turns):
            for event in _one_by_one(new[:rows, i], done, ended[:rows, i], number):
                yield event
                number += 1
            done = ended[:rows, i]
            if done.all():
                return


def steps_a_call(leaves: list[jax.Array]) -> int:
    """How many steps of a model `stream` asks for at once: on a CPU, what reads CPU_BYTES, 1 .. CPU_STEPS."""
    if not on_one_cpu(leaves):
        return 1
    return max(1, min(CPU_STEPS, CPU_BYTES // sum(x.nbytes for x in leaves)))


def _one_by_one(new: np.ndarray, before: np.ndarray, after: np.ndarray, number: int) -> Iterator[StreamEvent]:
    """A step's tokens [B, K], -1 where a row has fewer, as events of at most one token a row."""
    counts = (new >= 0).sum(1)
    for i in range(counts.max(initial=0)):
        yield StreamEvent(number + i, new[:, i], np.where(counts > i + 1, before, after))


@dataclass(frozen=True)
class Request:
    """A checked request: `rows` sequences, what the programs take, and the shapes to compile for.

    inputs: tokens and lengths, limit, sampler, key data, stop ids; rows are filled up to what the mesh divides.
    """

    rows: int
    inputs: tuple[Any, ...]
    shapes: Shapes
    how: dict[str, Any]  # the drafter, and whether rows go alone

    def parts(self, model: DeepseekV4):
        """The model as the programs take it; rows that go alone read weights in one order on any mesh."""
        return ready(model, turn=not self.how["alone"])

    def widened(self, prompt: int) -> tuple[Any, ...]:
        """The inputs, prompts padded to at least `prompt` tokens."""
        tokens, *others = self.inputs
        return (_pad(tokens, max(prompt, tokens.shape[1])), *others)

    @classmethod
    def make(cls, model, tokens, lengths, max_new_tokens, sampler, seed, stop_ids, drafts, deterministic) -> Request:
        tokens, lengths = _check_prompts(model, tokens, lengths)
        if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer of at least 1")
        drafter = _drafter(model, drafts)
        sampler = Greedy() if sampler is None else sampler
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler={sampler!r} must be a Sampler such as Greedy() or Sample(temperature=0.7)")
        _check_room(model, lengths, int(max_new_tokens))
        stop = np.asarray(list(stop_ids), np.int64)
        _check_ids(model, stop, "stop_ids")
        stop = np.concatenate([stop, np.full(8 - len(stop) % 8, -2)]).astype(np.int32)
        sizes = (tokens.shape[1], int(max_new_tokens), model.max_tokens)
        shapes = Shapes.of(*sizes, model.kernels.prefill_chunk)
        rows = len(tokens)
        keys = np.asarray(jax.random.key_data(row_keys(_check_seed(seed, rows), rows)))
        limit = np.full(rows, max_new_tokens, np.int32)
        tokens, lengths, limit, keys = _fill_shards(model, _pad(tokens, shapes.prompt), lengths, limit, keys)
        how = {"drafter": drafter, "alone": bool(deterministic)}
        return cls(rows, (tokens, lengths, limit, sampler, keys, stop), shapes, how)


def _fill_shards(model: DeepseekV4, *rows: np.ndarray) -> list[np.ndarray]:
    """Rows filled up to what the mesh divides: one-token prompts of token 0 (or 1) that want one new token."""
    extra = -len(rows[0]) % model.parallel.rows
    blank = lambda x: np.broadcast_to(np.asarray(x.ndim == 1, x.dtype), (extra, *x.shape[1:]))
    return [np.concatenate([x, blank(x)]) if extra else x for x in rows]


def _drafter(model: DeepseekV4, drafts: int) -> Drafter | None:
    if not isinstance(drafts, (int, np.integer)) or not 0 <= drafts <= MAX_DRAFTS:
        raise ValueError(f"drafts={drafts!r} must be an integer between 0 and {MAX_DRAFTS}")
    if drafts and not len(model.mtp):
        kind = "its DSpark drafter is not supported" if model.config.draft == "dspark" else "it has no MTP layer"
        raise ValueError(f"drafts={drafts}: this checkpoint cannot draft, {kind}; use drafts=0")
    return MtpDrafter(int(drafts)) if drafts else None


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
