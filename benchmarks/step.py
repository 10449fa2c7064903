"""A decode step on TPUs that are not there, part by part: the compiler's schedule beside what memory allows.

What one device does is compiled: its share of the sequences, and as many experts as it would hold, with even routing.
A model of three layers and one of five, an HCA and a CSA layer more, give what a pair of layers adds; the rest of the
model is as many pairs. A part takes max(static cycles / clock, bytes / HBM bandwidth), as `kernels` says; loops whose
length is up to data run to their end. Each different kernel is profiled by itself, for the profiler dies in whole
programs, but with its operands where the whole program has them: most lie in vector memory, where XLA left them or has
brought them beforehand. To what XLA does, its own estimates go. Not in it: the exchange between devices, whose bytes
are given.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from rich.console import Console
from rich.table import Table

from dsv4_jax.cache import LayerCache
from dsv4_jax.config import CSA, LayerSpec, ModelConfig
from dsv4_jax.experts import as_one
from dsv4_jax.kernels import TpuKernels
from dsv4_jax.model import DeepseekV4
from dsv4_jax.plan import parse_topology
from dsv4_jax.presets import PRESETS
from dsv4_jax.sharding import leaf_path
from pallas_kernels.aot import Case, require_compiler, run_cases
from pallas_kernels.chips import TPUS, Chip
from pallas_kernels.expert_matmul.tpu import expert_matmul_tpu
from pallas_kernels.index_topk import index_topk_tpu
from pallas_kernels.index_topk import tuning as index_tuning
from pallas_kernels.sparse_mla import Indices
from pallas_kernels.sparse_mla import tuning as mla_tuning
from pallas_kernels.sparse_mla.tpu import sparse_mla_tpu

SLICES = {  # the smallest that serve it; devices, all along `expert`
    "flash": {"v5p": "v5p:2x2x1", "v6e": "v6e:2x4", "v7x": "v7x:2x2x1"},
    "pro": {"v5p": "v5p:2x2x4", "v7x": "v7x:2x2x2"},
}
REST = "the rest, mostly by XLA"
PARTS = {  # start of a kernel's name -> what it is part of
    "fp8_matmul": "FP8 projections",
    "fp8_output": "output projection",
    "expert": "experts",  # their products, and what lies between those
    "route": "experts",
    "arrange_pairs": "experts",
    "add_rows": "experts",
    "sparse_mla": "sparse MLA",
    "put_rows": "sparse MLA",  # what they write is read there
    "pool_window": REST,
    "index": "indexer",
    "hyper_connection": "hyper-connections",
    "norm_heads": "sparse MLA",
    "store_rows": "sparse MLA",
    "rms_norm": REST,
    "round_rows": REST,
    "round_index": "indexer",
    "encode_index": "indexer",
}
STEP = "benchmarks.step:step"
RATIOS = {3: [0, 128, 4], 5: [0, 128, 4, 128, 4]}
WHOLE_TARGET, PART_TARGET = 2.0, 4.0  # at most so many times the roofline


@dataclass(frozen=True)
class CountedKernels(TpuKernels):
    """The same kernels with loops of a fixed length, so that a static profile counts all of their turns.

    used: blocks of experts that have rows.
    """

    used: int = 1

    def sparse_mla(self, q, positions, window, entries, picks, sinks, *, scale):
        B, T, H, D = q.shape
        N = 0 if entries is None else entries.shape[1]
        if isinstance(picks, Indices) and mla_tuning.gather_is_faster(self.chip, T, H, D, N, picks.index.shape[2]):
            N = picks.index.shape[2]
        config = mla_tuning.default_config(self.chip, B, T, H, N)
        config = dataclasses.replace(config, trips=math.ceil(N / config.block) if N else None)
        return sparse_mla_tpu(q, positions, window, entries, picks, sinks, scale=scale, config=config, **self._options)

    def pick_entries(self, q, weights, keys, visible, *, top_k):
        config = index_tuning.default_config(q.shape[1], keys.shape[1], self.chip, q.shape[0])
        config = dataclasses.replace(config, data_dependent=False)
        return index_topk_tpu(q, weights, keys, visible, top_k=top_k, config=config, **self._options)

    def expert_product(self, x, row, expert, used, w):
        used, stacks = min(self.used, len(expert)), w.shape[1] if len(w.shape) == 4 else 1
        w, options = as_one(w), self._options | {"stacks": stacks}
        return expert_matmul_tpu(x, expert, used, w.data, w.scale, row=row, packed=w.packed, **options)


def config_of(model: str, layers: int, experts: int) -> ModelConfig:
    """`layers` layers of a model, with so many of its experts; none looks its experts up by token."""
    ratios = {"num_hidden_layers": layers, "compress_ratios": [*RATIOS[layers], 0], "num_hash_layers": 0}
    return ModelConfig.from_dict(PRESETS[model] | ratios | {"n_routed_experts": experts})


def step(target: Chip, model: str, layers: int, experts: int, used: int, rows: int, context: int, cache_dtype: str):
    """The decode step of one device, and its operands: what `run_cases` compiles."""
    kernels = CountedKernels(target, used=used)
    held = {"dtype": jnp.bfloat16, "cache_dtype": cache_dtype}
    build = lambda: DeepseekV4(config_of(model, layers, experts), max_tokens=context, kernels=kernels, **held)
    module = jax.eval_shape(build)
    cache = jax.eval_shape(lambda: module.init_cache(rows))
    ids = jax.ShapeDtypeStruct((rows, 1), jnp.int32)

    def decode(module, cache, ids):
        streams, cache = module(ids, cache, jnp.ones((rows,), jnp.int32))
        return jnp.argmax(module.head(streams), -1), cache

    free = Format(Layout.AUTO)  # as in `generate`'s loop, before which XLA has laid everything out
    run = jax.jit(decode, donate_argnums=1, in_shardings=(free, free, None), out_shardings=(None, free))
    return run, (module, cache, ids)


def part_bytes(target: Chip, arguments: dict[str, Any], share: float) -> Counter[str]:
    """What each part of a step reads, at least: weights, `share` of the experts', and full caches."""
    _, (module, cache, _) = step(target, **arguments)
    found = Counter[str]()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(module):
        path, size = leaf_path(keys), leaf.size * leaf.dtype.itemsize
        if not path.startswith(("embed_tokens", "mtp", "rope")):
            found[part_of_weight(path)] += size * share if ".experts." in path else size
    for spec, layer in zip(module.config.layers, cache.layers, strict=True):
        found += cache_reads(module.config, spec, layer)
    return found


def part_of_weight(path: str) -> str:
    if ".experts." in path:
        return PARTS["expert"]
    if "o_a_proj" in path:
        return PARTS["fp8_output"]
    if "_hc." in path:
        return PARTS["hyper_connection"]
    is_fp8 = "shared_experts" in path or any(f".{name}_proj" in path for name in ("q_a", "q_b", "self_attn.kv", "o_b"))
    return PARTS["fp8_matmul"] if is_fp8 else REST


def cache_reads(config: ModelConfig, spec: LayerSpec, layer: LayerCache) -> Counter[str]:
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    found = Counter({PARTS["sparse_mla"]: size(layer.window)})
    if layer.compressor is not None:
        entries = layer.compressor.entries
        held = jax.tree.leaves(entries)[0].shape[1]
        picked = min(1, config.index_topk / held) if spec.kind == CSA else 1
        found[PARTS["sparse_mla"]] += size(entries) * picked
    if layer.indexer is not None:
        found[PARTS["index"]] += size(layer.indexer.entries)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e", "v7x"], choices=TPUS)
    parser.add_argument("--models", nargs="+", default=["flash"], choices=list(SLICES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--cache-dtype", default="bfloat16", choices=["bfloat16", "fp8"])
    parser.add_argument("--timeout", type=float, default=900, help="seconds the compiler may take for one program")
    parser.add_argument("--at-once", type=int, default=1, help="compilers that run side by side")


def run(args: argparse.Namespace) -> dict[str, Any]:
    require_compiler("tpu")
    wanted = [(model, SLICES[model][name]) for model in args.models for name in args.chips if name in SLICES[model]]
    with ThreadPoolExecutor(args.at_once) as pool:
        rows = list(
            pool.map(lambda one: measure(*one, args.batch, args.context, args.cache_dtype, args.timeout), wanted)
        )
    return {"batch": args.batch, "context": args.context, "cache_dtype": args.cache_dtype, "rows": rows}


def measure(model: str, place: str, batch: int, context: int, cache_dtype: str, timeout: float) -> dict[str, Any]:
    """Microseconds of each part of a step, by the schedule and at least."""
    topology, config = parse_topology(place), ModelConfig.from_dict(PRESETS[model])
    target, shards = topology.chip, topology.devices
    share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    held = config.n_routed_experts // shards
    common = {"experts": held, "used": round(share * held), "rows": batch // shards}
    common |= {"context": context, "cache_dtype": cache_dtype}
    arguments = [{"model": model, "layers": layers} | common for layers in RATIOS]
    try:
        programs = reports_of([Case(STEP, one) for one in arguments], target, timeout)
        kernels = kernel_cycles(target, arguments, programs[-1]["spaces"], timeout)
    except RuntimeError as error:
        return {"model": model, "slice": place, "error": str(error)}
    grow = lambda few, more: few + (config.num_hidden_layers - 3) / 2 * (more - few)
    whole = lambda counts: {part: grow(*(c[part] for c in counts)) for part in dict.fromkeys(PARTS.values())}
    by_part = [sum_by_part(kernels, i, report["xla_cycles"]) for i, report in enumerate(programs)]
    static = whole(by_part)
    least = whole([part_bytes(target, one, share) for one in arguments])
    parts = {
        part: {
            "static_us": 1e6 * static[part] / target.clock_hz,
            "roofline_us": 1e6 * least[part] / target.hbm_bytes_per_s,
        }
        for part in static
    }
    for figures in parts.values():
        figures["estimate_us"] = max(figures["static_us"], figures["roofline_us"])
        figures["ratio"] = figures["estimate_us"] / figures["roofline_us"]
    sum_of = lambda name: sum(figures[name] for figures in parts.values())
    step_us, roofline = sum_of("estimate_us"), sum_of("roofline_us")
    found = {"model": model, "slice": place, "parts": parts, "step_us": step_us, "roofline_us": roofline}
    found["kernels"] = [
        {"name": one.name, "calls": grow(*one.calls), "us": 1e6 * one.cycles / target.clock_hz, "placed": one.placed}
        for one in kernels
    ]
    found["without"] = sorted({one.name for one in kernels if not one.cycles})
    exchanged = 2 * (shards - 1) / shards * batch // shards * config.hidden_size * 3 * config.num_hidden_layers
    return found | {"ratio": step_us / roofline, "exchanged_bytes": exchanged}


def reports_of(cases: list[Case], target: Chip, timeout: float, **options) -> list[dict[str, Any]]:
    reports = run_cases(cases, target.name, timeout=timeout, **options)
    errors = [report["error"] for report in reports if "error" in report]
    if errors:
        raise RuntimeError(errors[0])
    return reports


@dataclass(frozen=True)
class Profiled:
    """A kernel at one shape: static cycles of a call, and how often each of the programs calls it.

    cycles: 0 where the profiler has none wherever operands lie; the step is then without them, and says so.
    placed: with its operands where the programs have them; where that is too much at a time, or the profiler fails so,
      they come from HBM.
    """

    name: str
    cycles: int
    placed: bool
    calls: tuple[int, ...]


def kernel_cycles(
    target: Chip, arguments: list[dict[str, Any]], spaces: dict[str, list[bool]], timeout: float
) -> list[Profiled]:
    """Every different kernel of the programs, which differ in how often they call them; operands lie as there."""
    case = lambda given, kernel, spaces: Case(STEP, given, kernels_alone=True, kernel=kernel, spaces=spaces)
    firsts = reports_of([case(given, 0, {}) for given in arguments], target, timeout)
    names, *others = ([name for name, _ in report["calls"]] for report in firsts)
    if any(names != other for other in others):
        raise RuntimeError(f"the programs call different kernels: {names}, {others}")

    def profile(kernels: Sequence[int], spaces: dict[str, list[bool]]) -> dict[int, dict[str, Any]]:
        cases = [case(arguments[0], i, spaces) for i in kernels]
        return dict(zip(kernels, run_cases(cases, target.name, timeout=timeout, profile=("cycles",)), strict=True))

    reports = profile(range(len(names)), spaces)
    elsewhere = [i for i, report in reports.items() if not cycles_of(names[i], report)]
    reports |= profile(elsewhere, {})
    cycles = [cycles_of(name, reports[i]) for i, name in enumerate(names)]
    for name, report in zip(names, reports.values(), strict=True):
        if "error" in report:
            raise RuntimeError(f"{name}: {report['error']}")
    calls = zip(*([count for _, count in report["calls"]] for report in firsts), strict=True)
    placed = [i not in elsewhere for i in range(len(names))]
    return [Profiled(*one) for one in zip(names, cycles, placed, calls, strict=True)]


def sum_by_part(kernels: list[Profiled], program: int, xla_cycles: int) -> Counter[str]:
    found = Counter({REST: xla_cycles})
    for one in kernels:
        found[next(part for start, part in PARTS.items() if one.name.startswith(start))] += (
            one.calls[program] * one.cycles
        )
    return found


def cycles_of(name: str, report: dict[str, Any]) -> int:
    """0 where the profiler stopped before it had any, or the kernel does not compile."""
    kernels = report.get("kernels", {}).items()
    found = [facts.get("static_cycles", 0) for op, facts in kernels if re.match(rf"{name}[.\d]*$", op)]
    return found[0] if len(found) == 1 else 0


def show(result: dict[str, Any], console: Console) -> None:
    held = f"{result['batch']} sequences of {result['context']:,} tokens, caches in {result['cache_dtype']}"
    title = f"A decode step of {held}; nothing was run"
    table = Table("model", "slice", "part", "static us", "roofline us", "estimate us", "ratio", title=title)
    for row in result["rows"]:
        if "error" in row:
            console.print(f"{row['model']} on {row['slice']}: {row['error']}", markup=False)
            continue
        for part, figures in row["parts"].items():
            times = [f"{figures[name]:.0f}" for name in ("static_us", "roofline_us", "estimate_us")]
            late = "" if figures["ratio"] <= PART_TARGET else " MISSED"
            table.add_row(row["model"], row["slice"], part, *times, f"{figures['ratio']:.2f}{late}")
        late = "" if row["ratio"] <= WHOLE_TARGET else " MISSED"
        sums = "", f"{row['roofline_us']:.0f}", f"{row['step_us']:.0f}", f"{row['ratio']:.2f}{late}"
        table.add_row(row["model"], row["slice"], "all", *sums, end_section=True)
        if row["without"]:
            console.print(f"{row['model']} on {row['slice']}: no cycles for {', '.join(row['without'])}", markup=False)
    console.print(table)
