"""AsyncSchedule: which independent branches of a layer may overlap, and how many steps the host keeps in flight.

A model makes one and hands it to every layer, MTP layers included. The branches, in the order in which a layer forks:
inputs (the query and KV projections; beside them what compressor and indexer project), entries (the query; beside it
compressor and indexer), experts (the routed ones; beside them the shared one).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

try:
    from jax.experimental.compute_on import compute_on2 as compute_on  # jax 0.10
except ImportError:
    from jax.experimental.compute_on import compute_on

State = TypeVar("State")


@dataclass(frozen=True)
class AsyncSchedule:
    """Lanes beside the main one, and steps in flight.

    lanes: side lanes that branches take turns on; 0 runs everything in order.
    streams: whether a lane is a GPU stream of its own. Elsewhere a lane is no more than the absence of a data
      dependence, which is all that the schedulers of TPU and CPU compilers need.
    in_flight: steps dispatched before the results of the oldest are fetched.
    """

    lanes: int = 3
    streams: bool = False
    in_flight: int = 2

    def fork(self, main: Callable[[], Any], *branches: Callable[[], Any], lane: int = 1) -> tuple[Any, ...]:
        """(main(), *branches results); branch i may run on lane `lane` + i while main runs.

        The branches are started first, and main's result is fenced off, so that no compiler moves main's work behind
        the point where the branches are joined.
        """
        if not (self.lanes and self.streams):
            return (main(), *(branch() for branch in branches))
        started = [self._on(lane + i)(branch)() for i, branch in enumerate(branches)]
        return (jax.lax.optimization_barrier(main()), *started)

    def _on(self, lane: int) -> Callable[[Callable], Callable]:
        stream = f"gpu_stream:{1 + (lane - 1) % self.lanes}"
        return functools.partial(compute_on, compute_type=stream, out_memory_spaces=jax.memory.Space.Device)

    def run(self, step: Callable[[State], tuple[State, Any]], state: State, steps: int) -> Iterator[Any]:
        """Yield the host copies of what each of `steps` calls of `step` gives back, `in_flight` calls late."""
        queue: collections.deque[Any] = collections.deque()
        for _ in range(steps):
            state, out = step(state)
            for leaf in jax.tree.leaves(out):
                leaf.copy_to_host_async()
            queue.append(out)
            if len(queue) > self.in_flight:
                yield jax.device_get(queue.popleft())
        while queue:
            yield jax.device_get(queue.popleft())


IN_ORDER = AsyncSchedule(lanes=0)
