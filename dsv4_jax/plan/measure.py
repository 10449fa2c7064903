"""Compile one step for devices that are not there, in a process of its own, and read what the compiler says of it.

A compiler that aborts takes its process along, and JAX chooses its platforms once a process; hence the child.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding

from dsv4_jax.config import ModelConfig
from dsv4_jax.generate.decode import DecodeState, decode_step
from dsv4_jax.generate.sampling import Greedy
from dsv4_jax.generate.speculative import Drafts, MtpDrafter
from dsv4_jax.kernels import Kernels, TpuKernels, XlaKernels
from dsv4_jax.kernels_gpu import GpuKernels
from dsv4_jax.model import DeepseekV4
from dsv4_jax.plan.topology import Topology, parse_topology
from dsv4_jax.sharding import Parallel, named_mesh
from pallas_kernels.chips import MOSAIC_GPUS

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "f4e2m1fn": 4, "f8e8m0fnu": 8}
GPU_FLAGS = "--xla_gpu_enable_triton_gemm=false"  # its tiles are chosen by timing, which is not to be had
# Equal pieces of a program become one: a quarter of the code, and less memory and time to make it.
TPU_FLAGS = "--xla_tpu_enable_deduplicated_calls=true --xla_jf_hlo_deduplication=true"


@dataclass(frozen=True)
class Job:
    """One step to compile: "decode" for a token and `drafts` more a sequence, "prefill" for `tokens` of each."""

    fields: dict[str, Any]  # of config.json
    topology: str
    mesh: dict[str, int]  # sizes of data, expert, model
    step: str
    batch: int
    context: int
    tokens: int = 1
    drafts: int = 0
    cache_dtype: str | None = "fp8"
    kernels: str = "auto"

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.fields)

    @property
    def rows(self) -> int:
        """Sequences, filled up to what the mesh divides."""
        shards = self.mesh["data"] * self.mesh["expert"]
        return -(-self.batch // shards) * shards


def strategy(topology: Topology, name: str = "auto") -> Kernels:
    """What "auto" would choose on these devices, but with the kernels for GPUs where they exist."""
    if name not in ("auto", "xla", topology.chip.platform.replace("cuda", "gpu")):
        raise ValueError(f"kernels={name!r} is not for {topology.chip.name}; choose 'auto' or 'xla'")
    if name == "xla" or topology.chip.platform == "cuda" and topology.chip.generation not in MOSAIC_GPUS:
        return XlaKernels()
    return TpuKernels(topology.chip) if topology.chip.platform == "tpu" else GpuKernels(topology.chip)


def abstract_model(job: Job, parallel: Parallel) -> DeepseekV4:
    """The model of a job, nothing allocated."""
    options: dict[str, Any] = {"max_tokens": job.context, "dtype": jnp.bfloat16, "cache_dtype": job.cache_dtype}
    kernels = strategy(parse_topology(job.topology), job.kernels)
    return jax.eval_shape(lambda: DeepseekV4(job.config, kernels=kernels, parallel=parallel, **options))


def lower(job: Job):
    """The step of a job, traced and lowered for its devices; and its weights with their places."""
    topology = parse_topology(job.topology)
    mesh = named_mesh(job.mesh, topology.make_devices())
    parallel = Parallel.over(mesh, job.config)
    model = abstract_model(job, parallel)
    step, state = (decode_inputs if job.step == "decode" else prefill_inputs)(job, model)
    row, weights = parallel.batch_spec, parallel.place(model)
    # As between the turns of `generate`'s loop, the compiler chooses how the state lies in memory.
    free = Format(Layout.AUTO, NamedSharding(mesh, row))
    places = (jax.tree.map(lambda x: x.sharding, weights), free)
    run = parallel.shard(step, (parallel.specs(model), row), row)
    run = jax.jit(run, donate_argnums=1, in_shardings=places, out_shardings=free)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return run.trace(weights, state).lower(lowering_platforms=(topology.chip.platform,)), weights


def decode_inputs(job: Job, model: DeepseekV4):
    """`generate`'s own decode step, and the state it takes."""
    drafter = MtpDrafter(job.drafts) if job.drafts else None
    array: Any = jax.ShapeDtypeStruct
    rows = array((job.rows,), jnp.int32)

    def step(model, state):
        stop, limit = jnp.zeros((1,), jnp.int32), jnp.full(state.token.shape, job.context)
        keys = jax.random.wrap_key_data(jnp.zeros((*state.token.shape, 2), jnp.uint32))
        return decode_step(model, state, Greedy(), keys, stop, limit, drafter)

    drafts = None
    if drafter:
        memory = jax.eval_shape(lambda: drafter.init(model, job.rows))
        guesses = array((job.rows, job.drafts), jnp.int32)
        drafts = Drafts(guesses, memory, guesses, rows)
    cache = jax.eval_shape(lambda: model.init_cache(job.rows, drafts=job.drafts))
    return step, DecodeState(rows, array((job.rows,), jnp.bool_), rows, cache, drafts)


def prefill_inputs(job: Job, model: DeepseekV4):
    """A chunk of a prompt through the model and the cache."""

    def step(model, state):
        tokens, count, cache = state
        streams, cache = model(tokens, cache, count, in_loop=model.kernels.loops_over_layers)
        return tokens, streams[:, -1], cache

    tokens = jax.ShapeDtypeStruct((job.rows, job.tokens), jnp.int32)
    cache = jax.eval_shape(lambda: model.init_cache(job.rows))
    return step, (tokens, jax.ShapeDtypeStruct((job.rows,), jnp.int32), cache)


def on_device(tree: Any) -> int:
    """Bytes that one device holds of placed arrays."""
    return sum(map(_size, jax.tree.leaves(tree)))


def _size(x) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def measure(job: Job) -> dict[str, Any]:
    """Compile a job in this process. Times in seconds, sizes in bytes a device."""
    began = time.perf_counter()
    lowered, weights = lower(job)
    traced = time.perf_counter()
    found: dict[str, Any] = {"weights": on_device(weights)}
    found |= {"trace_seconds": traced - began, "stablehlo_bytes": len(lowered.as_text())}
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    arguments, aliased = memory.argument_size_in_bytes, memory.alias_size_in_bytes
    found |= {
        "state": memory.output_size_in_bytes,  # the cache as it lies in memory, padding included
        "temporaries": memory.temp_size_in_bytes,
        "peak": arguments + memory.output_size_in_bytes - aliased + memory.temp_size_in_bytes,
        "collectives": collectives(compiled.as_text()),
        "compile_seconds": time.perf_counter() - traced,
        "compiler_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return found


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Kind -> how many there are in a compiled program and what they give back, in bytes; a loop's body counts once."""
    number, size = Counter[str](), Counter[str]()
    for line in hlo.splitlines():
        found = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.+?) (" + "|".join(COLLECTIVES) + r")(-start)?\(", line)
        if found:
            pieces = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", found[1])
            pieces = pieces[len(pieces) // 2 :] if found[3] and len(pieces) > 1 else pieces  # (operands, results)
            number[found[2]] += 1
            size[found[2]] += sum(_bytes(*piece) for piece in pieces)
    return {kind: {"count": number[kind], "bytes": size[kind]} for kind in COLLECTIVES if number[kind]}


def _bytes(dtype: str, shape: str) -> int:
    bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
    return math.prod(int(side) for side in shape.split(",") if side) * bits // 8


def measure_in_child(job: Job, timeout: float = 1800) -> dict[str, Any]:
    """`measure` in a process of its own; {"error": ...} where it fails, with the compiler's own words."""
    is_gpu = parse_topology(job.topology).chip.platform == "cuda"
    name, flags = ("XLA_FLAGS", GPU_FLAGS) if is_gpu else ("LIBTPU_INIT_ARGS", TPU_FLAGS)
    env = {"MALLOC_ARENA_MAX": "1"} | os.environ  # with an arena a thread, what passes have freed stays with each
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    env[name] = " ".join(filter(None, [os.environ.get(name), flags]))
    command = [sys.executable, "-m", "dsv4_jax.plan.measure"]
    try:
        child = subprocess.run(
            command, input=json.dumps(dataclasses.asdict(job)), env=env, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"error": f"the compiler did not end within {timeout:.0f} s"}
    lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines and not child.returncode else {"error": _reason(child.stderr)}


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"RESOURCE_EXHAUSTED|Error|error|exceeds", line)]
    return (telling or lines or ["the compiler gave no reason"])[-1][:600]


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.stdin.read())))))
