"""Layers of one kind in a loop: their code is compiled once, at the price of a copy of each layer's weights and cache.

A compiler takes seconds and some 70 MB for every layer that is written out. A step of many tokens takes longer over a
layer than over its copy; decoding, which does little but read the weights, does not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

FEWEST_TURNS = 4  # for fewer, layers are written out
SMALL = 1 << 20  # bytes up to which leaves of all layers are put together: one operation, not one for each


@dataclass(frozen=True)
class Run:
    """Layers first .. first + period * turns - 1 of a model, of which each is like the one `period` before it."""

    first: int
    period: int
    turns: int

    @property
    def end(self) -> int:
        return self.first + self.period * self.turns

    def like(self, place: int) -> range:
        """The layers at one place of every period."""
        return range(self.first + place, self.end, self.period)


NO_RUN = Run(0, 1, 0)


def longest_run(kinds: Sequence[Hashable]) -> Run:
    """The run that spares most layers; NO_RUN where none has FEWEST_TURNS."""
    best = NO_RUN
    for period in range(1, len(kinds) // FEWEST_TURNS + 1):
        for start in range(len(kinds)):
            one, turns = kinds[start : start + period], 1
            while kinds[start + turns * period : start + (turns + 1) * period] == one:
                turns += 1
            if turns >= FEWEST_TURNS and (turns - 1) * period > (best.turns - 1) * best.period:
                best = Run(start, period, turns)
    return best


def kind_of(tree: Any) -> Hashable:
    """What two trees have to share for one piece of code to serve both."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, x.dtype) for x in leaves)


def picker(trees: Sequence[Any]) -> Callable[[jax.Array], Any]:
    """A function of an index: a copy of the tree there; all are of one kind. Small leaves are put together, once."""
    leaves = [jax.tree.leaves(tree) for tree in trees]
    is_small = [x.size * x.dtype.itemsize <= SMALL for x in leaves[0]]
    small, large = (
        [[x for x, s in zip(one, is_small, strict=True) if s == want] for one in leaves] for want in (True, False)
    )
    stacks = [jnp.stack(same) for same in zip(*small, strict=True)]

    def pick(index: jax.Array) -> Any:
        parts = iter([x[index] for x in stacks]), iter(choose(index, large))
        return jax.tree.unflatten(jax.tree.structure(trees[0]), [next(parts[0 if s else 1]) for s in is_small])

    return pick


def choose(index: jax.Array, options: Sequence[Any]) -> Any:
    """A copy of the option at `index`."""
    return jax.lax.switch(index, [lambda held, i=i: held[i] for i in range(len(options))], list(options))


def put(index: jax.Array, trees: Sequence[Any], tree: Any) -> list[Any]:
    """The trees with `tree` at `index`. One condition each: a single one over all of them would copy them all."""
    return [jax.lax.cond(index == i, lambda _, new: new, lambda old, _: old, old, tree) for i, old in enumerate(trees)]


def loop(run: Run, layers: Sequence[Any], states: Sequence[Any], x: Any, apply: Callable[[int, Any, Any, Any], Any]):
    """`x, state = apply(place, layer, x, state)` for every layer of the run, in order -> x, the states."""

    pick = [picker([layers[i] for i in run.like(place)]) for place in range(run.period)]

    def turn(index, carry):
        x, held = carry
        held = list(held)
        for place in range(run.period):
            mine = slice(place, None, run.period)
            x, state = apply(place, pick[place](index), x, choose(index, held[mine]))
            held[mine] = put(index, held[mine], state)
        return x, tuple(held)

    return jax.lax.fori_loop(0, run.turns, turn, (x, tuple(states[run.first : run.end])))
