"""plan: whether a model fits a slice, what one step costs at least, and what would fit if it does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dsv4_jax.cache import Cache, LayerCache
from dsv4_jax.config import CSA, HCA, LayerSpec, ModelConfig
from dsv4_jax.model import DeepseekV4
from dsv4_jax.plan.measure import Job, abstract_model, measure_in_child, on_device
from dsv4_jax.plan.topology import Topology
from dsv4_jax.sharding import AXES, PRESETS, Parallel, leaf_path, mesh_sizes, sizes_of

PREFILL_TOKENS = 2048
ROWS_ONLY = ("embed_tokens", "tid2eid", "rope_main", "rope_compress")  # arrays of which a step reads a few rows


@dataclass(frozen=True)
class Sizes:
    """Bytes that one device holds between steps, exact; and the least that a decode step moves and computes."""

    weights: int
    cache: int
    step_bytes: float
    step_flops: float

    def step_seconds(self, topology: Topology) -> float:
        """A lower bound: all bytes at the memory's peak rate, or all products at the matrix unit's."""
        chip = topology.chip
        return max(self.step_bytes / chip.hbm_bytes_per_s, self.step_flops / chip.fp8_flops)


@dataclass(frozen=True)
class Plan:
    """What was asked, and found. Sizes are bytes a device; decode and prefill are as `measure.measure` gives them."""

    topology: str
    devices: int
    mesh: dict[str, int]
    batch: int
    context: int
    drafts: int
    hbm: int
    weights: int
    cache: int
    step_seconds: float
    decode: dict[str, Any]
    prefill: dict[str, Any]
    suggestion: str | None = None

    @property
    def needed(self) -> int:
        """Weights, the cache as it lies in memory, and the larger step's temporaries."""
        temporaries = max(step.get("temporaries", 0) for step in (self.decode, self.prefill))
        return self.weights + max(self.cache, self.decode.get("state", 0)) + temporaries

    @property
    def errors(self) -> list[str]:
        named = (("decode", self.decode), ("prefill", self.prefill))
        return [f"{name}: {step['error']}" for name, step in named if "error" in step]

    @property
    def fits(self) -> bool:
        return not self.errors and self.needed <= self.hbm

    @property
    def tokens_per_second(self) -> float:
        """An upper bound for the whole batch, without accepted drafts."""
        return self.batch / self.step_seconds

    def to_json(self) -> dict[str, Any]:
        derived = ("needed", "fits", "errors", "tokens_per_second")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def resolve_mesh(text: str, config: ModelConfig, devices: int) -> dict[str, int]:
    """Sizes of the axes for a preset's name, or from sizes written out."""
    if text in PRESETS:
        return mesh_sizes(config, devices, text)
    sizes = sizes_of(text)
    if math.prod(sizes.values()) != devices:
        raise ValueError(f"mesh {text!r} is for {math.prod(sizes.values())} devices, the topology has {devices}")
    return sizes


def sizes(job: Job) -> Sizes:
    """What a job's devices hold and move, nothing allocated or compiled."""
    config, rows = job.config, job.rows
    mesh = AbstractMesh(tuple(job.mesh[name] for name in AXES), AXES)
    parallel = Parallel.over(mesh, config)
    model = abstract_model(dataclasses.replace(job, kernels="xla"), parallel)  # which does not change what is held
    cache = jax.eval_shape(lambda: (model.init_cache(rows, drafts=job.drafts), model.init_mtp_cache(rows)))
    placed = parallel.place(model)
    share = rows // parallel.rows
    bytes_read = _weight_bytes(job, placed, parallel) + share / rows * _cache_bytes(config, cache[0])
    flops = share * (1 + job.drafts) * _flops(config, placed, parallel, job)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return Sizes(on_device(placed), whole * share // rows, bytes_read, flops)


def _touched(job: Job, parallel: Parallel) -> float:
    """The share of experts that get a token, were routing even."""
    config = job.config
    tokens = job.rows // parallel.data * (1 + job.drafts)
    return 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens


def _weight_bytes(job: Job, placed: DeepseekV4, parallel: Parallel) -> float:
    total = 0.0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(placed):
        path = leaf_path(keys)
        if any(name in path for name in ROWS_ONLY) or (path.startswith("mtp") and not job.drafts):
            continue
        total += on_device(leaf) * (_touched(job, parallel) if ".mlp.experts." in path else 1)
    return total


def _cache_bytes(config: ModelConfig, cache: Cache) -> float:
    """What all sequences together read of their caches, when these are full."""
    return sum(_layer_bytes(config, spec, layer) for spec, layer in zip(config.layers, cache.layers, strict=True))


def _layer_bytes(config: ModelConfig, spec: LayerSpec, layer: LayerCache) -> float:
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    if spec.kind != CSA:
        return size(layer)
    assert layer.compressor is not None
    entries = layer.compressor.entries
    held = jax.tree.leaves(entries)[0].shape[1]
    return size(layer) - size(entries) * (1 - min(1, config.index_topk / held))


def _flops(config: ModelConfig, placed: DeepseekV4, parallel: Parallel, job: Job) -> float:
    """Of one token on one of its devices: products with weights, and with cache rows."""
    total = 0.0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(placed):
        path = leaf_path(keys)
        if (
            path.endswith(".scale")
            or any(name in path for name in ROWS_ONLY)
            or path.startswith("mtp")
            or leaf.ndim < 2
        ):
            continue
        elements = math.prod(leaf.sharding.shard_shape(leaf.shape)) * (2 if leaf.dtype == jnp.uint8 else 1)
        # Each of a token's experts is on one device, and the tokens of all `expert` shards meet there.
        active = config.num_experts_per_tok / config.n_routed_experts * parallel.expert
        total += 2 * elements * (active if ".mlp.experts." in path else 1)
    heads = config.num_attention_heads // parallel.model
    for spec in config.layers:
        entries = job.context // spec.ratio if spec.ratio else 0
        picked = min(entries, config.index_topk) if spec.kind == CSA else entries if spec.kind == HCA else 0
        total += 4 * heads * config.head_dim * (config.sliding_window + picked)
        if spec.kind == CSA:
            total += 2 * config.index_n_heads * config.index_head_dim * entries
    return total


def plan(
    fields: dict[str, Any],
    topology: Topology,
    *,
    mesh: str = "throughput",
    batch: int = 64,
    context: int = 131072,
    drafts: int = 0,
    cache_dtype: str | None = "fp8",
    prefill_tokens: int = PREFILL_TOKENS,
    compiled: bool = True,
    timeout: float = 1800,
) -> Plan:
    """Compile the real decode and prefill steps for a mesh of devices that are not there.

    Args:
      fields: a config.json. mesh: a preset's name, or "data=1,expert=8,model=2".
      batch: sequences in all, filled up to what the mesh divides; context: tokens each may hold.
      prefill_tokens: of a chunk; one sequence a shard is prefilled at a time.
      compiled: False leaves the compilers out: weights, cache and bounds from shapes alone.
      timeout: seconds that a compiler may take.
    """
    config = ModelConfig.from_dict(fields)
    axes = resolve_mesh(mesh, config, topology.devices)
    decode = Job(fields, topology.name, axes, "decode", batch, context, 1, drafts, cache_dtype)
    found = sizes(decode)
    shards = axes["data"] * axes["expert"]
    prefill = dataclasses.replace(decode, step="prefill", batch=shards, tokens=min(prefill_tokens, context), drafts=0)
    result = Plan(
        topology.name, topology.devices, axes, decode.rows, context, drafts, topology.chip.hbm_bytes, found.weights,
        found.cache, found.step_seconds(topology), {}, {},
    )  # fmt: skip
    if compiled and result.fits:
        result = dataclasses.replace(result, decode=measure_in_child(decode, timeout))
        result = dataclasses.replace(result, prefill=measure_in_child(prefill, timeout))
    return result if result.fits else dataclasses.replace(result, suggestion=_suggest(decode, mesh, topology, result))


def _suggest(job: Job, mesh: str, topology: Topology, result: Plan) -> str:
    """The smallest slice of the same chip that holds the same job, by shapes and the temporaries seen."""
    temporaries = result.needed - result.weights - result.cache
    if mesh not in PRESETS:
        return f"try --mesh {' or '.join(PRESETS)}, or a larger slice"
    for larger in topology.larger():
        axes = mesh_sizes(job.config, larger.devices, mesh)
        found = sizes(dataclasses.replace(job, topology=larger.name, mesh=axes))
        if found.weights + found.cache + temporaries <= larger.chip.hbm_bytes:
            return f"{larger.name} would hold it: {(found.weights + found.cache) / 2**30:.1f} GiB a device"
    return f"no usual {topology.chip.name} slice holds it; lower the batch or the context, or use cache_dtype fp8"


def sweep(
    fields: dict[str, Any],
    topology: Topology,
    batches: Iterable[int],
    contexts: Iterable[int],
    *,
    mesh: str = "throughput",
    drafts: int = 0,
    cache_dtype: str | None = "fp8",
    temporaries: int = 0,
) -> list[dict[str, Any]]:
    """A row for each batch and context, from shapes: bytes a device, and the bounds of the decode step.

    temporaries: bytes to allow for, as one compiled plan has found them.
    """
    axes = resolve_mesh(mesh, ModelConfig.from_dict(fields), topology.devices)
    rows = []
    shards = axes["data"] * axes["expert"]
    for context in contexts:
        for batch in sorted({-(-batch // shards) * shards for batch in batches}):
            job = Job(fields, topology.name, axes, "decode", batch, context, 1, drafts, cache_dtype)
            found = sizes(job)
            needed, seconds = found.weights + found.cache + temporaries, found.step_seconds(topology)
            rows.append(
                {"batch": job.rows, "context": context, "weights": found.weights, "cache": found.cache}
                | {"needed": needed, "fits": needed <= topology.chip.hbm_bytes, "step_seconds": seconds}
                | {"tokens_per_second": job.rows / seconds}
            )
    return rows
