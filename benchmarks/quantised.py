"""Quantised weights on this CPU: a decode step and the memory of one model in FP8 and FP4, and in float32.

Both checkpoints are random and have the same shapes; one is in the official formats (FP8 blocks, FP4 experts), and is
held so. Rounds time the two in turn, so that a busy machine slows both alike. Memory is what a run has to hold: the
weights, and the workspace of its compiled program as XLA reports it, where weights that it expands are.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import checkpoints
import dsv4_jax
from benchmarks import random_prompt
from benchmarks.models import MODELS
from checkpoints.synth import synth
from dsv4_jax.generate.api import Request, generate_program
from dsv4_jax.model import DeepseekV4
from dsv4_jax.presets import PRESETS

FORMATS = ("float32", "quantised")
TARGETS = {"decode_ms": 1.0, "prefill_ms": None, "weights_mb": 0.25, "held_mb": 0.25}  # at most, of float32's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(MODELS), default="75M", help="the synthesised model")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=33, help="decode steps that are timed, and one more")
    parser.add_argument("--kernels", choices=("cpu", "xla"), default="cpu", help="platform strategy")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of which the median counts")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a decode step and of a prefill, megabytes (1e6), by format."""
    if args.new_tokens < 2 or min(args.prompt_tokens, args.repeats) < 1:
        raise ValueError("--new-tokens must be at least 2, --prompt-tokens and --repeats at least 1")
    with tempfile.TemporaryDirectory(prefix="dsv4-benchmark-") as directory:
        capacity = args.prompt_tokens + args.new_tokens
        models = {name: _model(args.model, name, Path(directory), capacity, args.kernels) for name in FORMATS}
    prompt = random_prompt(args.prompt_tokens, models["float32"].config.vocab_size)
    rows = {name: held(model, prompt, args.new_tokens) for name, model in models.items()}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMATS}
    for number in range(1 + args.repeats):
        for name, model in models.items():
            times = timed(model, prompt, args.new_tokens)
            rounds[name] += [times] if number else []  # the first round compiles
    for name, pairs in rounds.items():
        decode, prefill = (statistics.median(times) for times in zip(*pairs, strict=True))
        rows[name] = {"decode_ms": decode, "prefill_ms": prefill} | rows[name]
    plain, quantised = (rows[name] for name in FORMATS)
    return {
        "variant": "-".join([args.model] * (args.model != "75M") + [args.kernels] * (args.kernels != "cpu")),
        "model": args.model,
        "kernels": args.kernels,
        "prompt_tokens": args.prompt_tokens,
        "rows": rows,
        "ratios": {figure: quantised[figure] / plain[figure] for figure in plain},
    }


def _model(name: str, form: str, directory: Path, max_tokens: int, kernels: str) -> DeepseekV4:
    official = {key: PRESETS["flash"][key] for key in ("expert_dtype", "quantization_config")}
    path = synth(MODELS[name] | (official if form == "quantised" else {}), directory / form)
    return checkpoints.load(path, max_tokens=max_tokens, dtype=jnp.float32, numerics="exact", kernels=kernels)


def held(model: DeepseekV4, prompt: np.ndarray, new: int) -> dict[str, float]:
    """Megabytes of the weights, and of those and the workspace of the program that runs them."""
    request = Request.make(model, prompt, None, new, None, 0, (), 0, False)
    parts = request.parts(model)
    lowered = generate_program.lower(*parts, *request.inputs, shapes=request.shapes, **request.how)
    workspace = lowered.compile().memory_analysis().temp_size_in_bytes
    weights = sum(x.nbytes for x in jax.tree.leaves(model))  # what the program takes are views of the same
    return {"weights_mb": weights / 1e6, "held_mb": (weights + workspace) / 1e6}


def timed(model: DeepseekV4, prompt: np.ndarray, new: int) -> tuple[float, float]:
    """Milliseconds of a decode step, and of a prefill with its first token."""
    seconds = []
    for wanted in (1, new):
        began = time.perf_counter()
        dsv4_jax.generate(model, prompt, max_new_tokens=wanted)
        seconds.append(time.perf_counter() - began)
    first, whole = seconds
    return 1e3 * (whole - first) / (new - 1), 1e3 * first


def show(result: dict[str, Any], console: Console) -> None:
    title = f"{result['model']}, kernels {result['kernels']}, batch 1, {result['prompt_tokens']:,} tokens, on this CPU"
    table = Table("", *FORMATS, "ratio", "target", title=title)
    for figure, ratio in result["ratios"].items():
        target = TARGETS[figure]
        judged = "-" if target is None else f"<= {target:g} {'ok' if ratio <= target else 'MISSED'}"
        figures = (f"{result['rows'][name][figure]:.2f}" for name in FORMATS)
        table.add_row(figure.replace("_mb", ", MB").replace("_ms", ", ms"), *figures, f"{ratio:.2f}", judged)
    console.print(table)
