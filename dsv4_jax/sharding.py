"""Sharding: what is split over which axis of the mesh, as one table, and the collectives that the layers call.

A sharded model runs whole inside one `jax.shard_map`: every layer sees the arrays of its own device and names the few
places where devices talk to each other (`sum_model`, `gather_model`, and the experts' exchange in `dispatch.py`).

Axes of the mesh, any of which may be absent:
  data: sequences. Each lives on one shard, its cache too.
  expert: sequences too, and routed experts. Tokens travel to the experts and back, all to all.
  model: heads with their output groups, the vocabulary, the shared expert, and routed experts once more. Devices along
    it work on the same tokens and add up. A long prompt is split by sequence here, too: the indexer's heads are on
    every device, so each scores its own piece of a chunk's tokens, and the picks are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv4_jax.config import ModelConfig

AXES = ("data", "expert", "model")
BATCH = ("data", "expert")  # what sequences are split over
EXPERTS = ("expert", "model")  # what routed experts are split over

# End of a parameter's path -> the mesh axes that split each of its dimensions; what is not named is on every device.
RULES: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {
    "embed_tokens": ("model",),
    "lm_head": ("model",),
    "self_attn.q_b_proj": ("model",),
    "self_attn.sinks": ("model",),
    "self_attn.o_a_proj": ("model",),
    "self_attn.o_b_proj": (None, "model"),
    "mlp.experts.gate_up_proj": (EXPERTS,),
    "mlp.experts.down_proj": (EXPERTS,),
    "mlp.shared_experts.gate_up_proj": (None, "model"),
    "mlp.shared_experts.down_proj": (None, "model"),
}
PRESETS = ("latency", "throughput")
SMALLEST_PIECE = 64  # tokens, below which a chunk is not split by sequence


@dataclass(frozen=True)
class Parallel:
    """How many devices each axis has, as the layers see it; `mesh` is None for one device."""

    data: int = 1
    expert: int = 1
    model: int = 1
    mesh: Mesh | AbstractMesh | None = None

    @classmethod
    def over(cls, mesh: Mesh | AbstractMesh, config: ModelConfig) -> Parallel:
        """The axes of `mesh`, checked against `config`.

        Raises:
          ValueError: an axis of another name, or one whose size does not divide what it would split.
        """
        unknown = [str(name) for name in mesh.axis_names if name not in AXES]
        if unknown:
            raise ValueError(f"mesh axis {unknown[0]!r} is not known; name the axes from {', '.join(AXES)}")
        sizes = {name: mesh.shape.get(name, 1) for name in AXES}
        problem = conflict(config, sizes["expert"], sizes["model"])
        if problem:
            raise ValueError(problem)
        if isinstance(mesh, Mesh):  # `jax.make_mesh` makes explicit axes, whose arguments are not resharded
            mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        return cls(**sizes, mesh=mesh)

    @property
    def rows(self) -> int:
        """Shards of the batch."""
        return self.data * self.expert

    @property
    def expert_shards(self) -> int:
        return self.expert * self.model

    def sum_model(self, x: jax.Array) -> jax.Array:
        """Parts of a sum, one on each device along `model`, added in fp32 and rounded once to x.dtype."""
        return jax.lax.psum(x.astype(jnp.float32), "model").astype(x.dtype) if self.model > 1 else x

    def gather_model(self, x: jax.Array) -> jax.Array:
        """Pieces of the last axis put together."""
        return jax.lax.all_gather(x, "model", axis=x.ndim - 1, tiled=True) if self.model > 1 else x

    def sequence_piece(self, tokens: int) -> int:
        """Tokens of a chunk that each device along `model` takes, where the chunk is split by sequence; else all."""
        piece = tokens // self.model
        return piece if tokens % self.model == 0 and piece >= SMALLEST_PIECE else tokens

    def split_sequence(self, x: jax.Array) -> jax.Array:
        """This device's piece of the tokens in x [B, T, ...]."""
        T, piece = x.shape[1], self.sequence_piece(x.shape[1])
        return x if piece == T else jax.lax.dynamic_slice_in_dim(x, self.model_index() * piece, piece, 1)

    def join_sequence(self, x: jax.Array, tokens: int) -> jax.Array:
        """The pieces [B, T / model, ...] of `tokens` tokens put together."""
        return x if x.shape[1] == tokens else jax.lax.all_gather(x, "model", axis=1, tiled=True)

    def model_index(self) -> jax.Array | int:
        """Which device along `model` this is."""
        return jax.lax.axis_index("model") if self.model > 1 else 0

    def _batch_axes(self) -> tuple[str, ...]:
        return tuple(name for name in BATCH if getattr(self, name) > 1)

    def gather_rows(self, x: jax.Array) -> jax.Array:
        """Rows of all shards of the batch."""
        axes = self._batch_axes()
        return jax.lax.all_gather(x, axes, axis=0, tiled=True) if axes else x

    def sum_rows(self, x: jax.Array) -> jax.Array:
        """A count added up over all shards of the batch."""
        axes = self._batch_axes()
        return jax.lax.psum(x, axes) if axes else x

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest value of any device: what a loop with collectives in it must go by."""
        axes = tuple(name for name in AXES if getattr(self, name) > 1)
        return jax.lax.pmax(x, axes) if axes else x

    def spec(self, path: str) -> P:
        """How the parameter, or the part of a quantised one, at a dotted `path` lies on the mesh."""
        if self.mesh is None:
            return P()
        name = path.removesuffix(".data").removesuffix(".scale")
        rule = next((axes for end, axes in RULES.items() if name == end or name.endswith("." + end)), ())
        return P(*(self._present(axes) for axes in rule))

    def _present(self, axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        """The axes that the mesh has."""
        assert self.mesh is not None
        if isinstance(axes, tuple):
            return tuple(name for name in axes if name in self.mesh.axis_names) or None
        return axes if axes in self.mesh.axis_names else None

    @property
    def batch_spec(self) -> P:
        """For arrays whose first axis is the batch."""
        return P(self._present(BATCH)) if self.mesh is not None else P()

    def specs(self, tree: Any) -> Any:
        """`spec` of each leaf of a model, as a tree of its structure."""
        keyed, structure = jax.tree_util.tree_flatten_with_path(tree)
        return jax.tree.unflatten(structure, [self.spec(leaf_path(keys)) for keys, _ in keyed])

    def shard(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` run on every device with its own parts; as it is where there is no mesh."""
        if self.mesh is None:
            return function
        # Kernels do not say over which axes their outputs vary, so that is not checked.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def place(self, tree: Any) -> Any:
        """An abstract model with the sharding of every leaf, for compiling ahead of time."""
        if self.mesh is None:
            return tree
        put = lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec))
        return jax.tree.map(put, tree, self.specs(tree))


SINGLE = Parallel()


def leaf_path(keys) -> str:
    """A key path of the model's tree as dotted names: `layers.0.self_attn.q_a_proj.data`."""
    names = (str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in keys)
    return ".".join(name for name in names if name != "value")


def conflict(config: ModelConfig, expert: int, model: int) -> str | None:
    """Why experts over `expert` * `model` devices, or heads over `model`, cannot be; None where they can."""
    if config.n_routed_experts % (expert * model):
        return (
            f"n_routed_experts={config.n_routed_experts} cannot be split over expert={expert} x model={model}; "
            f"their product must divide it"
        )
    block = config.quantization.block[0] if config.quantization else 1
    for name, size, unit in [
        ("o_groups", config.o_groups, 1),
        ("vocab_size", config.vocab_size, 1),
        ("num_attention_heads * head_dim", config.num_attention_heads * config.head_dim, block),
        ("o_groups * o_lora_rank", config.o_groups * config.o_lora_rank, block),
        ("moe_intermediate_size", config.moe_intermediate_size, block),
    ]:
        if model > 1 and size % (model * unit):
            blocks = f" into whole blocks of {unit}" if unit > 1 else ""
            return f"{name}={size} cannot be split over model={model}{blocks}; make the mesh's axis 'model' smaller"
    return None


def mesh_sizes(config: ModelConfig, devices: int, preset: str) -> dict[str, int]:
    """Sizes of the axes for a preset.

    latency: as much `model` as the config allows, so that one sequence is worked on by as many devices as can be.
    throughput: as much `expert` as the config allows, so that each sequence's cache and attention stay on one device.
    What is left over is `expert`, then `model`, then `data`.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not known; choose {' or '.join(PRESETS)}")
    divisors = [n for n in range(devices, 0, -1) if devices % n == 0]
    if preset == "latency":
        model = next(n for n in divisors if conflict(config, 1, n) is None)
        expert = next(n for n in divisors if devices % (n * model) == 0 and conflict(config, n, model) is None)
    else:
        expert = next(n for n in divisors if conflict(config, n, 1) is None)
        model = next(n for n in divisors if devices % (n * expert) == 0 and conflict(config, expert, n) is None)
    return {"data": devices // (expert * model), "expert": expert, "model": model}


def make_mesh(config: ModelConfig, preset: str = "latency", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or of those given) with the axes data, expert and model, sized by `preset`."""
    devices = jax.devices() if devices is None else devices
    return named_mesh(mesh_sizes(config, len(devices), preset), devices)


def named_mesh(sizes: dict[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """A mesh with axes of these sizes, over the devices in their order: neighbours share `model` first."""
    shape = tuple(sizes.get(name, 1) for name in AXES)
    if int(np.prod(shape)) != len(devices):
        text = " x ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True))
        raise ValueError(f"a mesh of {text} needs {int(np.prod(shape))} devices, there are {len(devices)}")
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str, config: ModelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A preset's name, or sizes such as "data=2,expert=4", as a mesh."""
    devices = jax.devices() if devices is None else devices
    if text in PRESETS:
        return make_mesh(config, text, devices)
    return named_mesh(sizes_of(text), devices)


def sizes_of(text: str) -> dict[str, int]:
    """ "data=2,expert=4" -> the size of every axis, 1 where none is given."""
    try:
        sizes = {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        sizes = {}
    if not sizes or set(sizes) - set(AXES) or min(sizes.values()) < 1:
        raise ValueError(f"mesh {text!r}: write {' or '.join(PRESETS)}, or sizes such as data=2,expert=4,model=1")
    return {name: sizes.get(name, 1) for name in AXES}
