"""A model as compiled programs take it: structure and arrays, and, where it is small, its weights laid out anew."""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref

import jax
import numpy as np

from dsv4_jax.kernels import SMALL_BYTES
from dsv4_jax.model import DeepseekV4
from dsv4_jax.quantized import QuantizedArray, Stack, Turned, TurnedGroups, dequantize
from dsv4_jax.sharding import leaf_path

# Ends of the paths of matrices that nothing but products reads; stacks of experts are read in parts.
TURNED = (
    *("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", "gate_proj", "weights_proj", "e_proj", "h_proj", "lm_head"),
    *("gate.weight", "hc.fn", "hc_head.fn", "shared_experts.gate_up_proj", "shared_experts.down_proj"),
)
GROUPED = "o_a_proj"  # one block a group of heads
STACKED = (".experts.gate_up_proj", ".experts.down_proj")
MOST_EXPERTS = 32  # of a layer: each is a branch in every compiled program


class Structure:
    """A model's tree structure as a static argument; equality is decided by identity first, being asked every step."""

    def __init__(self, treedef):
        self.treedef, self._hash = treedef, hash(treedef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        return self is other or (isinstance(other, Structure) and self.treedef == other.treedef)


Parts = tuple[Structure, list[jax.Array]]


def split(model: DeepseekV4) -> Parts:
    leaves, treedef = jax.tree.flatten(model)
    return Structure(treedef), leaves


class _Latest:
    """What was prepared last, as long as the arrays that it was made from live."""

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self._sources: list[weakref.ref] = []
        self._made_of: tuple[Structure, bool] | None = None
        self._structure: Structure | None = None
        self._leaves: list[jax.Array | int] = []  # which source it is, for one that stayed as it was

    def get(self, structure: Structure, leaves: list[jax.Array], turn: bool) -> Parts | None:
        same = len(leaves) == len(self._sources) and all(r() is x for r, x in zip(self._sources, leaves, strict=True))
        if self._structure is None or not same or self._made_of != (structure, turn):
            return None
        return self._structure, [leaves[x] if isinstance(x, int) else x for x in self._leaves]

    def put(self, structure: Structure, leaves: list[jax.Array], turn: bool, parts: Parts) -> None:
        place = {id(x): i for i, x in enumerate(leaves)}
        self._sources = [weakref.ref(x, self._drop) for x in leaves]
        self._made_of, self._structure = (structure, turn), parts[0]
        self._leaves = [place.get(id(x), x) for x in parts[1]]

    def _drop(self, source: weakref.ref) -> None:
        if any(source is held for held in self._sources):
            self._clear()


_latest = _Latest()


def ready(model: DeepseekV4, turn: bool = True) -> Parts:
    """The model as compiled programs take it.

    A small model spends more time on expanding its weights at each step, and on products of few rows with weights in
    the checkpoint's order, than on reading them: both are done once, and kept while the model lives. On a CPU, a few
    experts are taken apart, so that the chosen ones are read where they lie.

    turn: whether weights may be reordered, which changes how sums round; never done over a mesh.
    """
    structure, leaves = split(model)
    turn = turn and model.parallel.mesh is None
    if model.kernels.reads_packed:
        return structure, leaves
    parts = _latest.get(structure, leaves, turn)
    if parts is None:
        small = 0 < prepared_bytes(model, turn) <= SMALL_BYTES
        prepared = _prepare(structure, leaves, turn) if small else model
        parts = split(take_apart(prepared) if turn and on_one_cpu(leaves) else prepared)
        _latest.put(structure, leaves, turn, parts)
    return parts


def on_one_cpu(leaves: list[jax.Array]) -> bool:
    """Whether a single CPU device holds the model; `load(partition=)` may have spread it without a mesh of ours."""
    devices = {device for x in leaves for device in x.devices()}
    return len(devices) == 1 and devices.pop().platform == "cpu"


def _is_weight(x) -> bool:
    return isinstance(x, QuantizedArray)


def prepared_bytes(model: DeepseekV4, turn: bool) -> int:
    """What the copies of `prepare` would take."""
    keyed, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_weight)
    is_copied = lambda keys, leaf: _is_weight(leaf) or (turn and leaf_path(keys).endswith((*TURNED, GROUPED)))
    return sum(math.prod(leaf.shape) for keys, leaf in keyed if is_copied(keys, leaf)) * model.dtype.itemsize


def prepare(model: DeepseekV4, turn: bool) -> DeepseekV4:
    """Quantised weights written out in the model's dtype (and still marked), matrices turned if wanted."""

    def turned(keys, leaf):
        path = leaf_path(keys)
        wide = dequantize(leaf, model.dtype) if _is_weight(leaf) else leaf
        if turn and path.endswith(TURNED):
            wide = Turned.of(wide)
        elif turn and path.endswith(GROUPED):
            wide = TurnedGroups.of(wide, model.config.o_groups)
        return QuantizedArray(wide, None, leaf.block) if _is_weight(leaf) else wide

    return jax.tree_util.tree_map_with_path(turned, model, is_leaf=_is_weight)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _prepare(structure, leaves, turn):
    return prepare(jax.tree.unflatten(structure.treedef, leaves), turn)


def take_apart(model: DeepseekV4) -> DeepseekV4:
    """Unquantised experts and groups of o_a, each an array of its own over the same memory."""
    groups = model.config.o_groups

    def parts_of(path: str, held: jax.Array) -> np.ndarray | None:
        if path.endswith(STACKED) and held.shape[0] <= MOST_EXPERTS:
            return np.asarray(held)
        return np.asarray(held).reshape(groups, -1, held.shape[-1]) if path.endswith(GROUPED) else None

    def apart(keys, leaf):
        held = leaf.data if _is_weight(leaf) else leaf
        if not isinstance(held, jax.Array) or (_is_weight(leaf) and leaf.scale is not None):
            return leaf
        parts = parts_of(leaf_path(keys), held)
        stack = held if parts is None else Stack.of(held, parts)
        return dataclasses.replace(leaf, data=stack) if _is_weight(leaf) else stack

    is_whole = lambda x: isinstance(x, QuantizedArray | Turned | TurnedGroups)
    return jax.tree_util.tree_map_with_path(apart, model, is_leaf=is_whole)
