"""The smallest TPU slices, and the GPU node, that serve the published models: their real steps, compiled for them.

One sequence a shard. Compiling takes some ten minutes and up to 5 GiB a step, so what has been measured is kept in
--work, and a run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv4_jax.plan import Plan, Topology, parse_topology
from dsv4_jax.plan.measure import Job, measure_in_child
from dsv4_jax.plan.report import PREFILL_TOKENS, sizes
from dsv4_jax.plan.topology import usual
from dsv4_jax.presets import PRESETS
from pallas_kernels.aot import require_compiler
from pallas_kernels.chips import CHIPS, TPUS, Chip

GIB = 2**30
SERVED = (("flash", 131072), ("flash", 1048576), ("pro", 131072))
GPU_CONTEXT, GPU_NODES = 131072, (("flash", "H200x8"),)
STEPS = ("decode", "prefill")
PARTS = ("dsv4_jax", "pallas_kernels")
MODEL_AXES = (1, 2, 4, 8)  # the first with which a model fits is taken
ALLOWANCE = 0.1  # of the memory, for temporaries, when a slice is chosen by shapes alone
PADDED = {"tpu": 1.8, "cuda": 1.0}  # an 8-bit cache as it lies in memory, over its bytes
MOST_TEMPORARIES, MOST_RSS, MOST_SECONDS = 0.03, 6 * GIB, 900  # targets: decode's share of the memory; the compiler's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chips", nargs="+", default=[*TPUS, "H200"], choices=[*TPUS, "H200"])
    parser.add_argument("--models", nargs="+", default=["flash", "pro"], choices=["flash", "pro"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[131072, 1048576], help="tokens a sequence may have")
    parser.add_argument("--work", type=Path, default=Path(".cache/slices"), help="where finished steps are kept")
    parser.add_argument("--at-once", type=int, default=1, help="compilers that run side by side")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a step")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """A row for each model, context and chip: where it fits, and what compiling its two steps found."""
    for platform in {CHIPS[name].platform for name in args.chips}:
        require_compiler(platform)
    served = [(model, context) for model, context in SERVED if model in args.models and context in args.contexts]
    chosen = [found for name in args.chips for found in choose(CHIPS[name], served)]
    jobs = [step for _, job in chosen for step in (job, prefill_of(job))]
    with ThreadPoolExecutor(args.at_once) as pool:
        measured = list(pool.map(lambda job: measure_once(job, args.work, args.timeout), jobs))
    pairs = zip(measured[::2], measured[1::2], strict=True)
    return {"rows": [row_of(*one, *pair) for one, pair in zip(chosen, pairs, strict=True)]}


def choose(chip: Chip, served: Sequence[tuple[str, int]]) -> Iterator[tuple[str, Job]]:
    """(model, the decode step on the smallest slice that should hold it); of GPUs, on those of GPU_NODES."""
    for model, context in served:
        if chip.platform == "cuda":
            nodes = [node for name, node in GPU_NODES if name == model and node.startswith(f"{chip.name}x")]
            places: Iterable[Topology] = map(parse_topology, nodes if context == GPU_CONTEXT else ())
        else:
            places = usual(chip)
        meshes = ((place, axis) for place in places for axis in MODEL_AXES if place.devices % axis == 0)
        jobs = (decode_of(model, context, *mesh) for mesh in meshes)
        for job in itertools.islice(filter(should_fit, jobs), 1):
            yield model, job


def decode_of(model: str, context: int, place: Topology, axis: int) -> Job:
    """One token of one sequence a shard, where `axis` devices share a shard's heads."""
    mesh = {"data": 1, "expert": place.devices // axis, "model": axis}
    return Job(PRESETS[model], place.name, mesh, "decode", mesh["expert"], context)


def prefill_of(decode: Job) -> Job:
    return dataclasses.replace(decode, step="prefill", tokens=PREFILL_TOKENS)


def should_fit(job: Job) -> bool:
    try:
        found = sizes(job)
    except ValueError:  # the model cannot be cut into so many
        return False
    chip = parse_topology(job.topology).chip
    return found.weights + PADDED[chip.platform] * found.cache <= (1 - ALLOWANCE) * chip.hbm_bytes


def measure_once(job: Job, work: Path, timeout: float) -> dict[str, Any]:
    """`measure_in_child`, unless its result for this very code lies in `work`; errors are not kept."""
    text = json.dumps(dataclasses.asdict(job), sort_keys=True) + code_digest()
    path = work / f"{job.step}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = measure_in_child(job, timeout)
    if "error" not in found:
        work.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(found))
        os.replace(unfinished, path)
    return found


def row_of(model: str, job: Job, decode: dict, prefill: dict) -> dict[str, Any]:
    found, place = sizes(job), parse_topology(job.topology)
    known = (place.name, place.devices, job.mesh, job.rows, job.context, job.drafts, place.chip.hbm_bytes)
    held = (found.weights, found.cache, found.step_seconds(place))
    return {"model": model} | Plan(*known, *held, decode, prefill).to_json()


def code_digest() -> str:
    """Of the sources that decide what is compiled."""
    files = sorted(file for part in PARTS for file in (Path(__file__).parents[1] / part).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def show(result: dict[str, Any], console: Console) -> None:
    """Print a row a slice: GiB a device, and what the compiler took."""
    columns = ("weights", "cache", "decode", "prefill", "needed", "of", "fits")
    table = Table("model", "context", "slice", *columns, "compiled in, s", "by, GiB", title="GiB a device")
    for row in result["rows"]:
        cell = lambda step, key, row=row: row[step].get(key, float("nan"))
        gib = lambda value: f"{value / GIB:.2f}"
        seconds = "; ".join(f"{cell(s, 'trace_seconds') + cell(s, 'compile_seconds'):.0f}" for s in STEPS)
        rss = "; ".join(f"{cell(s, 'compiler_rss') / GIB:.1f}" for s in STEPS)
        sizes = [row["weights"], row["cache"], *(cell(s, "temporaries") for s in STEPS), row["needed"], row["hbm"]]
        fits = "yes" if row["fits"] else "no"
        table.add_row(row["model"], f"{row['context']:,}", row["topology"], *map(gib, sizes), fits, seconds, rss)
    console.print(table)
    for line in missed(result["rows"]):
        console.print(line)


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """What is not as it should be."""
    lines = []
    for row in rows:
        name = f"{row['model']} at {row['context']:,} on {row['topology']}"
        share = row["decode"].get("temporaries", 0) / row["hbm"]
        lines += [f"MISSED: {name}: temporaries of decode are {share:.1%}"] if share > MOST_TEMPORARIES else []
        for step in STEPS:
            found = row[step]
            if "error" in found:
                lines.append(f"{name}, {step}: {found['error']}")
                continue
            seconds = found["trace_seconds"] + found["compile_seconds"]
            lines += [f"MISSED: {name}, {step}: compiled in {seconds:.0f} s"] if seconds > MOST_SECONDS else []
            rss = found["compiler_rss"]
            lines += [f"MISSED: {name}, {step}: compiled by {rss / GIB:.1f} GiB"] if rss > MOST_RSS else []
    return lines
