"""One CPU, float32: prefill and decode of this project, of transformers, and the floors of the machine.

Everything is measured in one run. Decode is the difference of two `generate` calls, so that the prefill cancels. Each
round times ours and the floors in turn, and medians over rounds count, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import checkpoints
import dsv4_jax
from benchmarks import floors, random_prompt
from benchmarks.models import MODELS, count_parameters
from checkpoints.synth import synth
from dsv4_jax.config import ModelConfig

PROMPT_TOKENS, NEW_TOKENS = 1024, 64
TINY_PROMPT, REPEATS = 128, 5
BUSY_LOAD = 0.5  # one-minute load average above which other work is in the way
ROOT = Path(__file__).resolve().parent.parent
NO_PEER = "transformers not installed: pip install dsv4-jax[oracle]"

# What is asked of us. At most so many times the floor, batch 1, by model:
OVER_FLOOR = {"75M": {"decode": 1.7, "prefill": 2.0}, "600M": {"decode": 1.5, "prefill": 2.0}}
# At least so many times as fast as transformers: 75M at batch 1, and the bundled checkpoint; ahead everywhere else.
FASTER = {"decode": 4.0, "prefill": 3.0, "tiny decode": 20.0}
BATCH_GAIN = 3.0  # at least, of 8 rows, in tokens/s over one row


def targets(model: str, batch: int) -> dict[str, dict[str, float]]:
    """{row: {"floor": at most, "transformers": at least}} of a run."""
    rows: dict[str, dict[str, float]] = {name: {"transformers": 1.0} for name in ("decode", "prefill")}
    if batch == 1:
        rows = {name: row | {"floor": OVER_FLOOR[model][name]} for name, row in rows.items()}
        if model == "75M":
            rows = {name: row | {"transformers": FASTER[name]} for name, row in rows.items()}
    return rows | {"tiny decode": {"transformers": FASTER["tiny decode"]}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(MODELS), default="75M", help="the synthesised model")
    parser.add_argument("--batch", type=int, default=1, help="rows; more than one are also compared with one")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="decode steps that are timed, and one more")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="runs of which the median counts")
    parser.add_argument("--tiny", type=Path, default=checkpoints.bundled_path(), help="default: the bundled checkpoint")
    parser.add_argument("--kernels", choices=("cpu", "xla"), default="cpu", help="platform strategy of ours")
    parser.add_argument("--peer-python", help="an interpreter that has torch and transformers, if this one has not")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; milliseconds, GB/s (1e9) and GFLOP/s."""
    if args.new_tokens < 2 or min(args.batch, args.prompt_tokens, args.repeats) < 1:
        raise ValueError("--new-tokens must be at least 2, --batch, --prompt-tokens and --repeats at least 1")
    peer_python = find_peer(args.peer_python)
    load = os.getloadavg()[0]  # before we add to it
    fields = MODELS[args.model]
    config = ModelConfig.from_dict(fields)
    sizes = {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "repeats": args.repeats}
    with tempfile.TemporaryDirectory(prefix="dsv4-benchmark-") as directory:
        path = synth(fields, Path(directory) / args.model)
        rows, machine = compare(path, args.kernels, peer_python, batch=args.batch, **sizes)
        if args.batch > 1:
            alone, _ = measure_ours(path, args.kernels, batch=1, **sizes)
            rows["decode"]["times_one_row"] = args.batch * alone["decode_ms"] / rows["decode"]["ours_ms"]
    tiny, _ = compare(args.tiny, "auto", peer_python, batch=1, **sizes | {"prompt_tokens": TINY_PROMPT})
    decode_bytes = floors.touched_bytes(config, args.prompt_tokens + args.new_tokens // 2, args.batch)
    flops = args.batch * floors.prefill_flops(config, args.prompt_tokens)
    rows["decode"]["floor_ms"] = decode_bytes / max(machine["GB/s"].values()) / 1e6
    rows["prefill"]["floor_ms"] = flops / max(machine["GFLOP/s"].values()) / 1e6
    unusual = {"": args.model, "kernels-": args.kernels, "batch": args.batch, "tokens": args.prompt_tokens}
    return {
        "variant": "-".join(f"{k}{v}" for k, v in unusual.items() if v not in ("75M", "cpu", 1, PROMPT_TOKENS)),
        "model": {
            "name": args.model,
            "parameters": count_parameters(fields),
            "batch": args.batch,
            "kernels": args.kernels,
        }
        | sizes,
        "machine": machine | {"load_before": load, "decode_bytes": decode_bytes, "prefill_flops": flops},
        "rows": with_ratios({"prefill": rows["prefill"], "decode": rows["decode"], "tiny decode": tiny["decode"]}),
        "peer": rows["peer"] or NO_PEER,
    }


def compare(
    path: Path, kernels: str, peer_python: str | None, **sizes: int
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Ours and transformers' milliseconds on one checkpoint ("peer": versions, equal tokens); the machine's rates."""
    ours, machine = measure_ours(path, kernels, **sizes)
    rows: dict[str, Any] = {k: {"ours_ms": ours[f"{k}_ms"]} for k in ("prefill", "decode")}
    if peer_python is None:
        return rows | {"peer": None}, machine
    peer = measure_peer(peer_python, path, **sizes)
    for what in ("prefill", "decode"):
        rows[what] |= {"transformers_ms": peer[f"{what}_ms"], "transformers_threads": peer[f"{what}_threads"]}
        rows[what]["transformers_by_threads_ms"] = {r["threads"]: r[f"{what}_ms"] for r in peer["by_threads"]}
    same = ours["tokens"] == peer["tokens"]
    return rows | {"peer": {"versions": peer["versions"], "same_tokens": same}}, machine


def measure_ours(
    path: Path, kernels: str, *, batch: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Medians over rounds: milliseconds of a prefill with its first token and of a decode step; the machine's rates."""
    capacity = prompt_tokens + new_tokens
    model = checkpoints.load(path, max_tokens=capacity, dtype=jnp.float32, numerics="exact", kernels=kernels)
    prompt = random_prompt(prompt_tokens, model.config.vocab_size, batch)

    def timed(new: int) -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        out = dsv4_jax.generate(model, prompt, max_new_tokens=new)
        return time.perf_counter() - began, out.tokens

    timed(1), timed(new_tokens)  # compile
    prefills, steps, bandwidths, gemms = [], [], [], []
    for _ in range(repeats):
        first, _ = timed(1)
        whole, tokens = timed(new_tokens)
        prefills.append(1e3 * first)
        steps.append(1e3 * (whole - first) / (new_tokens - 1))
        bandwidths.append(floors.read_bandwidth())
        gemms.append(floors.gemm_rate())
    ours = {"prefill_ms": statistics.median(prefills), "decode_ms": statistics.median(steps), "tokens": tokens.tolist()}
    return ours, {"GB/s": _medians(bandwidths), "GFLOP/s": _medians(gemms)}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(rates[name] for rates in rounds) for name in rounds[0]}


def find_peer(asked: str | None) -> str | None:
    """The interpreter to time transformers with: the one asked for, or this one if it has them, or None.

    Raises ValueError if the one asked for cannot import torch and transformers' DeepSeek-V4.
    """
    if asked is None:
        return sys.executable if all(map(importlib.util.find_spec, ("torch", "transformers"))) else None
    check = [asked, "-c", "import torch, transformers.models.deepseek_v4"]
    try:
        done = subprocess.run(check, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--peer-python {asked}: {error}") from error
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"--peer-python {asked}: {why}; install torch and a transformers that has deepseek_v4 there")
    return asked


def measure_peer(python: str, path: Path, **sizes: int) -> dict[str, Any]:
    """What `benchmarks.peer_transformers` measures, in a process of its own."""
    command = [python, "-m", "benchmarks.peer_transformers", str(path), "--json"]
    command += [word for name, size in sizes.items() for word in ("--" + name.replace("_", "-"), str(size))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def with_ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each row with `over_floor` (ours / floor) and `times_transformers` (theirs / ours) where both are known."""
    for row in rows.values():
        if "floor_ms" in row:
            row["over_floor"] = row["ours_ms"] / row["floor_ms"]
        if "transformers_ms" in row:
            row["times_transformers"] = row["transformers_ms"] / row["ours_ms"]
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table, the floors behind it and what is missing."""
    model, machine = result["model"], result["machine"]
    wanted, size = targets(model["name"], model["batch"]), f"{model['parameters']:,} parameters"
    how = f"float32, kernels {model['kernels']}, batch {model['batch']}"
    title = f"{model['name']} ({size}), {how}, {model['prompt_tokens']:,} tokens"
    table = Table("", "ours", "floor", "x floor", "transformers", "x faster", title=title)
    for name, row in result["rows"].items():
        target = wanted[name]
        peer = f"{row['transformers_ms']:.2f} ms" if "transformers_ms" in row else "-"
        floor = f"{row['floor_ms']:.2f} ms" if "floor_ms" in row else "-"
        over = _judged(row.get("over_floor"), target.get("floor"), at_most=True)
        faster = _judged(row.get("times_transformers"), target.get("transformers"), at_most=False)
        table.add_row(name, f"{row['ours_ms']:.2f} ms", floor, over, peer, faster)
    console.print(table)
    if gain := result["rows"]["decode"].get("times_one_row"):
        judged = _judged(gain, BATCH_GAIN if model["batch"] == 8 else None, at_most=False)
        console.print(f"decode: {gain:.2f} times the tokens/s of one row: {judged}")
    for unit, label, work in (("GB/s", "decode reads", "decode_bytes"), ("GFLOP/s", "prefill needs", "prefill_flops")):
        rates = ", ".join(f"{how} {rate:.1f}" for how, rate in machine[unit].items())
        amount = f"{machine[work] / 1e6:.1f} MB" if work == "decode_bytes" else f"{machine[work] / 1e9:.1f} GFLOP"
        console.print(f"{label} {amount}; {unit}: {rates}; the highest is the floor")
    if machine["load_before"] > BUSY_LOAD:
        console.print(f"the machine was busy before this began (load {machine['load_before']:.1f}): do not trust these")
    if result["peer"] == NO_PEER:
        console.print(NO_PEER, markup=False)
    else:
        versions = ", ".join(f"{k} {v}" for k, v in result["peer"]["versions"].items())
        same = "the same tokens" if result["peer"]["same_tokens"] else "DIFFERENT TOKENS"
        console.print(f"transformers' best of 1 and 2 threads ({versions}); greedy decoding gave {same}")


def _judged(ratio: float | None, target: float | None, *, at_most: bool) -> str:
    if ratio is None or target is None:
        return "-"
    met = ratio <= target if at_most else ratio >= target
    return f"{ratio:.2f} {'ok' if met else 'MISSED'} ({'<=' if at_most else '>='} {target:g})"
