"""What a stream did: its rate once compiled, how its drafts fared, and the memory that the process took."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from dsv4_jax.generate import Stats, StreamEvent, stream
from dsv4_jax.model import DeepseekV4
from dsv4_jax.schedule import AsyncSchedule


@dataclass(frozen=True)
class StreamStats(Stats):
    """`Stats` of a stream, and when its tokens came.

    first_seconds: until the first token of each row was there. warm_tokens came after the first step, in
    warm_seconds: everything was compiled by then.
    """

    first_seconds: float = 0.0
    warm_tokens: int = 0
    warm_seconds: float = 0.0

    @property
    def warm_tokens_per_second(self) -> float:
        return self.warm_tokens / self.warm_seconds if self.warm_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"warm_tokens_per_second": self.warm_tokens_per_second}


@dataclass
class _Log:
    """What a schedule saw of a run."""

    steps: int = 0  # that gave tokens, of those whose results the host has fetched
    calls: int = 0  # that they took
    drafts: Any = None  # of the newest state
    first_call: float = 0.0  # when the first one's results were there


@dataclass(frozen=True)
class _WatchedSchedule(AsyncSchedule):
    """The same schedule, which writes down what passes through its loop."""

    log: _Log = field(default_factory=_Log, compare=False)  # two of them compile to the same program

    def run(self, step, state, steps):
        def watched(state):
            state, out = step(state)
            self.log.drafts = state.drafts
            return state, out

        for new, ended in super().run(watched, state, steps):
            self.log.steps += int((new >= 0).any((0, 2)).sum())
            self.log.calls += 1
            self.log.first_call = self.log.first_call or time.perf_counter()
            yield new, ended


class WatchedStream:
    """`dsv4_jax.stream(model, tokens, ...)`, to be iterated over once; `stats` says what it did, so far or in all."""

    def __init__(self, model: DeepseekV4, tokens, *, lengths=None, **request: Any):
        self._log, plain = _Log(), model.schedule
        fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(AsyncSchedule)}
        model = jax.tree.map(lambda leaf: leaf, model)  # another module around the same arrays
        model.schedule = _WatchedSchedule(**fields, log=self._log)
        shape = np.atleast_2d(np.asarray(tokens)).shape
        self._prompt_tokens = int(np.prod(shape) if lengths is None else np.sum(lengths))
        self._events = stream(model, tokens, lengths=lengths, **request)
        self._began = self._first = self._last = time.perf_counter()
        self._new = self._warm = 0

    def __iter__(self) -> Iterator[StreamEvent]:
        self._began = time.perf_counter()
        for event in self._events:
            count, self._last = int((event.tokens >= 0).sum()), time.perf_counter()
            if self._new == 0:
                self._first = self._last
            self._new += count
            self._warm += count if self._log.calls > 1 else 0
            yield event

    @property
    def stats(self) -> StreamStats:
        accepted, offered = self._drafts()
        return StreamStats(
            self._prompt_tokens,
            self._new,
            1 + self._log.steps,
            self._last - self._began,
            offered * len(accepted),
            accepted,
            self._first - self._began,
            self._warm,
            self._last - self._log.first_call if self._warm else 0.0,
        )

    def _drafts(self) -> tuple[tuple[int, ...], int]:
        """How often the draft of each position was right, and how often one was checked."""
        if self._log.drafts is None:
            return (), 0
        accepted, offered = jax.device_get((self._log.drafts.accepted, self._log.drafts.offered))
        return tuple(np.atleast_2d(accepted).sum(0).tolist()), int(np.sum(offered))


def peak_memory_bytes() -> int:
    """The most memory that this process has held at any time, files that it mapped included."""
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
