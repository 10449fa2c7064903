"""What a model's depth costs before XLA begins: seconds to trace and lower a decode step, and its program's size."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from checkpoints.synth import with_layers
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import DeepseekV4
from dsv4_jax.presets import PRESETS

DEPTHS, REPEATS, BATCH, CONTEXT = (8, 43), 3, 8, 32768
MOST_GROWTH = 2.0  # from 8 layers to 43


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=REPEATS, help="runs of which the median counts")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Flash with 8 and with 43 layers in turn, on the portable strategy: medians of seconds, StableHLO's size."""
    runs = [{depth: lower(depth) for depth in DEPTHS} for _ in range(args.repeats)]
    found = {}
    for depth in DEPTHS:
        seconds = {part: statistics.median(run[depth][part] for run in runs) for part in ("trace_s", "lower_s")}
        found[str(depth)] = seconds | {"characters": runs[0][depth]["characters"]}
    few, many = (found[str(depth)] for depth in DEPTHS)
    total = lambda row: row["trace_s"] + row["lower_s"]
    growth = {"seconds": total(many) / total(few), "characters": many["characters"] / few["characters"]}
    return {"batch": BATCH, "context": CONTEXT, "layers": found, "growth": growth}


def lower(depth: int) -> dict[str, Any]:
    """Trace and lower one decode step, with nothing cached."""
    jax.clear_caches()
    config = ModelConfig.from_dict(with_layers(PRESETS["flash"], depth))
    model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=CONTEXT, dtype=jnp.bfloat16, kernels="xla"))
    cache = jax.eval_shape(lambda: model.init_cache(BATCH))
    tokens, count = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32), jax.ShapeDtypeStruct((BATCH,), jnp.int32)

    def step(model, tokens, cache, count):
        streams, cache = model(tokens, cache, count)
        return jnp.argmax(model.head(streams), axis=-1), cache

    began = time.perf_counter()
    traced = jax.jit(step, donate_argnums=2).trace(model, tokens, cache, count)
    between = time.perf_counter()
    lowered = traced.lower()
    ended = time.perf_counter()
    return {"trace_s": between - began, "lower_s": ended - between, "characters": len(lowered.as_text())}


def show(result: dict[str, Any], console: Console) -> None:
    """Print a row a depth, and the growth."""
    table = Table("layers", "trace", "lower", "StableHLO", title="a decode step of Flash, before XLA begins")
    for depth, row in result["layers"].items():
        table.add_row(depth, f"{row['trace_s']:.2f} s", f"{row['lower_s']:.2f} s", f"{row['characters'] / 1e6:.2f} MB")
    console.print(table)
    growth = result["growth"]
    verdict = "ok" if max(growth.values()) < MOST_GROWTH else "MISSED"
    console.print(
        f"growth: time {growth['seconds']:.2f}x, size {growth['characters']:.2f}x: {verdict} (< {MOST_GROWTH:g}x)"
    )
