"""A long context on this CPU: a decode step after 65,536 tokens beside one after 1,024, and the memory of the prefill.

Each context runs in a process of its own. Both hold the same weights and compile the same programs, so what the peaks
of their memory differ by is what the longer prompt took. Its bound is by how much the caches differ, and the workspaces
of a chunk as XLA reports them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import dsv4_jax
from benchmarks import random_prompt
from benchmarks.models import MODELS
from dsv4_jax.config import ModelConfig
from dsv4_jax.generate.decode import PREFILL_CHUNK
from dsv4_jax.model import DeepseekV4
from dsv4_jax.random_weights import random_weights
from dsv4_jax.watch import peak_memory_bytes

SHORT, LONG, NEW_TOKENS = 1024, 65536, 64
MOST_STEP, MOST_MEMORY = 1.5, 1.3  # times the short step; times cache and workspace
ROOT = Path(__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(MODELS), default="75M", help="the model, of random weights")
    parser.add_argument("--context", type=int, default=LONG, help="tokens of the long prompt")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # a child's one context


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both contexts; milliseconds and bytes."""
    if args.only:
        return measure(args.model, args.only)
    rows = {str(context): in_a_child(args.model, context) for context in (SHORT, args.context)}
    short, long = rows.values()
    grown = {k: long[k] - short[k] for k in ("peak_bytes", "cache_bytes", "chunk_bytes")}
    return {
        "model": args.model,
        "contexts": rows,
        "step_ratio": long["step_ms"] / short["step_ms"],
        "memory_ratio": grown["peak_bytes"] / (grown["cache_bytes"] + grown["chunk_bytes"]),
    }


def in_a_child(model: str, context: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks", "long", "--json", "--model", model, "--only", str(context)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def measure(name: str, context: int) -> dict[str, Any]:
    """One prompt of `context` tokens and the steps after it."""
    config = ModelConfig.from_dict(MODELS[name])
    build = lambda: DeepseekV4(config, max_tokens=context + NEW_TOKENS, dtype=jnp.float32, numerics="exact")
    model = random_weights(build)
    chunk_bytes = workspace(model)
    prompt = random_prompt(context, config.vocab_size)[None]
    began, times = time.perf_counter(), []
    for _ in dsv4_jax.stream(model, prompt, max_new_tokens=NEW_TOKENS):
        times.append(time.perf_counter())
    steps = [after - earlier for earlier, after in zip(times[2:], times[3:], strict=False)]
    cache = jax.eval_shape(lambda: model.init_cache(1))
    return {
        "prefill_s": times[0] - began,  # and the compiler
        "step_ms": 1e3 * statistics.median(steps),
        "cache_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
        "chunk_bytes": chunk_bytes,
        "peak_bytes": peak_memory_bytes(),
    }


def workspace(model: DeepseekV4) -> int:
    """Temporaries of the program for one chunk, whose cache is updated in place."""
    cache = jax.eval_shape(lambda: model.init_cache(1))
    tokens, count = jax.ShapeDtypeStruct((1, PREFILL_CHUNK), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    step = jax.jit(lambda model, *args: model(*args), donate_argnums=2)
    return step.lower(model, tokens, cache, count).compile().memory_analysis().temp_size_in_bytes


def show(result: dict[str, Any], console: Console) -> None:
    """Print a row a context, and both ratios."""
    table = Table("context", "prefill", "a step", "cache", "workspace", "peak of the process", title=result["model"])
    megabytes = lambda n: f"{n / 1e6:,.0f} MB"
    for context, row in result["contexts"].items():
        sizes = (megabytes(row[k]) for k in ("cache_bytes", "chunk_bytes", "peak_bytes"))
        table.add_row(f"{int(context):,}", f"{row['prefill_s']:.1f} s", f"{row['step_ms']:.2f} ms", *sizes)
    console.print(table)
    for what, most in (("step", MOST_STEP), ("memory", MOST_MEMORY)):
        ratio = result[f"{what}_ratio"]
        console.print(f"{what}: {ratio:.2f}x, {'ok' if ratio <= most else 'MISSED'} (<= {most:g}x)")
