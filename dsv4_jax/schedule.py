"""AsyncSchedule: which independent branches of a layer may overlap, and how many steps the host keeps in flight.

A model makes one and hands it to every layer, MTP layers included. The branches, in the order in which a layer forks:
inputs (the latents of queries and of KV rows; beside them what compressor and indexer project), entries (the query;
beside it KV rows, compressor and indexer), experts (the routed ones; beside them the shared one).
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

from dsv4_jax.sharding import AXES

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

        What XLA cannot place stays off the streams: collectives, which have one of their own, and loops over slices.
        """
        if not (branches and self.lanes and self.streams):
            return (main(), *(branch() for branch in branches))
        regions = [Region.of(function) for function in (main, *branches)]
        # XLA starts a region as soon as the last of its operands has its place in the order of the program. So all of a
        # fork have the same ones, but for those that a region may overwrite: those nobody else may hold.
        shared = {id(x): x for region in regions for x in region.operands if not region.may_overwrite(x)}
        lanes = [0, *(1 + (lane - 1 + i) % self.lanes for i in range(len(branches)))]
        run = lambda region, stream: region.run_here() if region.stays else region.run(stream, [*shared.values()])
        return tuple(run(region, stream) for region, stream in zip(regions, lanes, strict=True))

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


@dataclass(frozen=True)
class Region:
    """A function of no arguments, traced, to run on a stream; the arrays that it closed over are its operands."""

    program: core.Jaxpr
    operands: Sequence[Any]
    results: Any

    @classmethod
    def of(cls, function: Callable[[], Any]) -> Region:
        closed, results = jax.make_jaxpr(function, return_shape=True)()
        return cls(closed.jaxpr, closed.consts, results)

    @property
    def stays(self) -> bool:
        """Whether anything in it names an axis of the mesh, or is a scan, whose slices JAX makes by calls."""
        return any(getattr(effect, "name", None) in AXES for effect in self.program.effects) or _slices(self.program)

    def run_here(self) -> Any:
        """The results, computed on no stream in particular."""
        return jax.tree.unflatten(jax.tree.structure(self.results), _evaluate(self.program, self.operands, ()))

    def may_overwrite(self, operand: jax.Array) -> bool:
        """Whether a result is like it: a cache that is given back is written in place."""
        like = (operand.shape, operand.dtype)
        return any((result.shape, result.dtype) == like for result in jax.tree.leaves(self.results))

    def run(self, stream: int, beside: Sequence[Any]) -> Any:
        """The results, computed on a stream once the arrays `beside` are there, too; 0 is the main one.

        Every jitted function in it is written out: XLA takes a call inside a region for a region, and cannot place it.
        """

        def body(operands, beside):
            operands, _ = jax.lax.optimization_barrier((operands, beside))
            return _evaluate(self.program, operands, ())

        options = {"compute_type": f"gpu_stream:{stream}", "out_memory_spaces": jax.memory.Space.Device}
        flat = functools.partial(compute_on, **options)(body)(self.operands, beside)
        return jax.tree.unflatten(jax.tree.structure(self.results), flat)


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


def _slices(jaxpr: core.Jaxpr) -> bool:
    """Whether there is a scan over slices in it, outside kernels."""
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan" and len(eqn.invars) + len(eqn.outvars) > params["num_consts"] + 2 * params["num_carry"]:
            return True
        if name in CALLS or name in HOLD_PROGRAMS:
            held = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, core.ClosedJaxpr))
            if any(_slices(x.jaxpr) for x in held if isinstance(x, core.ClosedJaxpr)):
                return True
    return False


def _rewritten(parameter: Any) -> Any:
    """The bodies of loops and conditionals without calls; anything else as it is."""
    if type(parameter) is tuple:  # the branches of a conditional
        return tuple(map(_rewritten, parameter))
    if not isinstance(parameter, core.ClosedJaxpr):
        return parameter
    body = lambda *args: _evaluate(parameter.jaxpr, parameter.consts, args)
    return jax.make_jaxpr(body)(*parameter.in_avals)
