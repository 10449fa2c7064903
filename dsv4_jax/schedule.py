"""AsyncSchedule: which independent branches of a layer may overlap, and how many steps the host keeps in flight.

A model makes one and hands it to every layer, MTP layers included. The branches, in the order in which a layer forks:
inputs (the query and KV projections; beside them what compressor and indexer project), entries (the query; beside it
compressor and indexer), experts (the routed ones; beside them the shared one).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax.experimental import compute_on as _compute_on
from jax.extend import core

State = TypeVar("State")
compute_on: Any = getattr(_compute_on, "compute_on2", _compute_on.compute_on)  # its name in jax 0.10, and after
CALLS = {  # primitives that call a function of their own -> the parameter that holds it
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}
HOLD_PROGRAMS = ("cond", "scan", "while", "custom_vjp_call")


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

        Branches are started first, and main's result is fenced off, so that main's work is not fused into what joins
        them again.
        """
        if not (self.lanes and self.streams):
            return (main(), *(branch() for branch in branches))
        started = [self._on(lane + i, branch) for i, branch in enumerate(branches)]
        return (jax.lax.optimization_barrier(main()), *started)

    def _on(self, lane: int, branch: Callable[[], Any]) -> Any:
        stream = f"gpu_stream:{1 + (lane - 1) % self.lanes}"
        on_stream = functools.partial(compute_on, compute_type=stream, out_memory_spaces=jax.memory.Space.Device)
        return on_stream(without_calls(branch))()

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


def without_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every jitted function in it, at any depth, written out.

    A call inside a stream's region is taken for a region of its own, which XLA cannot place.
    """

    def inlined(*args):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        out = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return inlined


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda var: var.val if isinstance(var, core.Literal) else values[var]
    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        if eqn.primitive.name in CALLS:
            called = eqn.params[CALLS[eqn.primitive.name]]
            outputs = _evaluate(called.jaxpr, called.consts, inputs)
        else:
            params = eqn.params
            if eqn.primitive.name in HOLD_PROGRAMS:  # a kernel's own body is no call, and knows axes that are not here
                params = {k: _rewritten(v) for k, v in params.items()}
            if hasattr(eqn.primitive, "get_bind_params"):  # a function with a gradient of its own
                params = eqn.primitive.get_bind_params(params)
            bound = eqn.primitive.bind(*inputs, **params)
            outputs = bound if eqn.primitive.multiple_results else [bound]
        values |= zip(eqn.outvars, outputs, strict=True)
    return [read(var) for var in jaxpr.outvars]


def _rewritten(parameter: Any) -> Any:
    """The bodies of loops and conditionals without calls; anything else as it is."""
    if type(parameter) is tuple:  # the branches of a conditional
        return tuple(map(_rewritten, parameter))
    if not isinstance(parameter, core.ClosedJaxpr):
        return parameter
    body = lambda *args: _evaluate(parameter.jaxpr, parameter.consts, args)
    return jax.make_jaxpr(body)(*parameter.in_avals)
