"""A long context on this CPU: a decode step after 65,536 tokens beside one after 1,024, and the memory of the prefill.

Each context runs in a process of its own, where a first run over a prompt of one chunk compiles everything. What that
run freed goes back to the system; how far anonymous memory then grows during the prefill, sampled every few
milliseconds, is held against the cache and the workspace of one chunk as XLA reports it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import threading
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
from checkpoints.memory import anonymous_bytes
from dsv4_jax.config import ModelConfig
from dsv4_jax.kernels import XlaKernels
from dsv4_jax.model import DeepseekV4
from dsv4_jax.random_weights import random_weights

SHORT, LONG, NEW_TOKENS = 1024, 65536, 64
SAMPLE_SECONDS = 0.005
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
    bound = long["cache_bytes"] + long["chunk_bytes"]
    return {
        "model": args.model,
        "contexts": rows,
        "step_ratio": long["step_ms"] / short["step_ms"],
        "memory_ratio": long["grown_bytes"] / bound,
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
    prompt = random_prompt(context, config.vocab_size)
    run = lambda **lengths: dsv4_jax.stream(model, prompt, max_new_tokens=NEW_TOKENS, **lengths)
    list(run(lengths=[min(context, XlaKernels.prefill_chunk)]))
    ctypes.CDLL(None).malloc_trim(0)
    began, times = time.perf_counter(), []
    with Growth() as growth:
        for _ in run():
            times.append(time.perf_counter())
    steps = [after - earlier for earlier, after in zip(times[2:], times[3:], strict=False)]
    cache = jax.eval_shape(lambda: model.init_cache(1))
    return {
        "prefill_s": times[0] - began,
        "step_ms": 1e3 * statistics.median(steps),
        "cache_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
        "chunk_bytes": chunk_bytes,
        "grown_bytes": growth.bytes,
    }


class Growth:
    """How far this process's anonymous memory grows while a block runs; Linux only."""

    bytes = 0

    def __enter__(self) -> Growth:
        self._begin, self._ended = anonymous_bytes(), threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, anonymous_bytes() - self._begin)

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._watcher.join()


def workspace(model: DeepseekV4) -> int:
    """Temporaries of the program for one chunk, whose cache is updated in place."""
    cache = jax.eval_shape(lambda: model.init_cache(1))
    chunk, count = ((1, XlaKernels.prefill_chunk), (1,))
    tokens, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (chunk, count))
    step = jax.jit(lambda model, *args: model(*args), donate_argnums=2)
    return step.lower(model, tokens, cache, count).compile().memory_analysis().temp_size_in_bytes


def show(result: dict[str, Any], console: Console) -> None:
    """Print a row a context, and both ratios."""
    table = Table("context", "prefill", "a step", "cache", "workspace", "grew by", title=result["model"])
    megabytes = lambda n: f"{n / 1e6:,.0f} MB"
    for context, row in result["contexts"].items():
        sizes = (megabytes(row[k]) for k in ("cache_bytes", "chunk_bytes", "grown_bytes"))
        table.add_row(f"{int(context):,}", f"{row['prefill_s']:.1f} s", f"{row['step_ms']:.2f} ms", *sizes)
    console.print(table)
    for what, most in (("step", MOST_STEP), ("memory", MOST_MEMORY)):
        ratio = result[f"{what}_ratio"]
        console.print(f"{what}: {ratio:.2f}x, {'ok' if ratio <= most else 'MISSED'} (<= {most:g}x)")
