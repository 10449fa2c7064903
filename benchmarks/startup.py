"""How soon there is something to see, and what Python costs afterwards, on this CPU.

Start-up: importing the package; the first token of `dsv4 generate` on the bundled checkpoint, from the start of the
process, with compiled programs kept from a run before. Afterwards: programs compiled over many prompts of mixed
lengths once each bucket has been seen, and how much longer a step takes when the host hands out every token (`stream`)
than in the loop on the device (`generate`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
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

ROOT = Path(__file__).resolve().parent.parent
IMPORT = "import time; began = time.perf_counter(); import dsv4_jax; print(time.perf_counter() - began)"
COMMAND = ["-c", "from dsv4_jax.cli import main; main()"]
GENERATE = [*COMMAND, "generate", "--prompt", "In the beginning", "--max-new-tokens", "8"]
LONGEST, PROMPTS, STEPS = 512, 100, 64
# Seconds, a count, and a share of the step.
TARGETS = {"import dsv4_jax": 1.5, "first token": 6.0, "recompilations": 0, "host's share of a step": 0.05}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", choices=sorted(MODELS), default="75M", help="the synthesised model whose steps count"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")


def run(args: argparse.Namespace) -> dict[str, Any]:
    imports = [float(_child("-c", IMPORT)[0]) for _ in range(args.repeats)]
    with tempfile.TemporaryDirectory(prefix="dsv4-benchmark-") as directory:
        firsts = [first_token(Path(directory) / "programs") for _ in range(args.repeats + 1)]
        model = checkpoints.load(
            synth(MODELS[args.model], Path(directory) / "model"), max_tokens=1024, dtype=jnp.float32
        )
        found = {"recompilations": recompilations(model)} | host_share(model, args.repeats)
    return {"model": args.model, "cold first token": firsts[0]} | {
        "import dsv4_jax": statistics.median(imports),
        "first token": statistics.median(firsts[1:]),
        **found,
    }


def _child(*arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def first_token(programs: Path) -> float:
    """Seconds from the start of `dsv4 generate` to its first text; compiled programs are kept in `programs`."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(programs), "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *GENERATE], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        seen = child.stdout.read(1)
        seconds = time.perf_counter() - began
        child.stdout.read()
    if not seen or child.returncode:
        raise RuntimeError(f"{' '.join(GENERATE)} ended with {child.returncode} and no text")
    return seconds


def recompilations(model) -> int:
    """Programs compiled for prompts of 1 to LONGEST tokens, after one of each bucket; samplers and seeds differ."""
    rng = np.random.default_rng(0)
    ids = random_prompt(LONGEST, model.config.vocab_size)
    sample = lambda heat: dsv4_jax.Sample(temperature=heat, top_p=0.9)
    generate = lambda length, heat, seed: dsv4_jax.generate(
        model, ids[:, :length], max_new_tokens=4, sampler=sample(heat), seed=seed
    )
    bucket = LONGEST
    while bucket >= 1:
        generate(bucket, 1.0, 0)
        bucket //= 2
    compiled: list[str] = []
    listen = lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for seed in range(PROMPTS):
            generate(int(rng.integers(1, LONGEST + 1)), float(rng.uniform(0.5, 1.5)), seed)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


def host_share(model, repeats: int) -> dict[str, Any]:
    """Milliseconds a step in `generate` and in `stream`, and the share of the latter that the host adds."""
    ids = random_prompt(64, model.config.vocab_size)

    def generated(new: int) -> float:
        began = time.perf_counter()
        dsv4_jax.generate(model, ids, max_new_tokens=new)
        return time.perf_counter() - began

    def streamed(new: int) -> float:
        events = dsv4_jax.stream(model, ids, max_new_tokens=new)
        next(events)
        began = time.perf_counter()
        for _ in events:
            pass
        return time.perf_counter() - began

    pairs = []
    generated(1), generated(STEPS), streamed(STEPS)  # compile
    for _ in range(repeats):
        inside = (generated(STEPS) - generated(1)) / (STEPS - 1)
        pairs.append((1e3 * inside, 1e3 * streamed(STEPS) / (STEPS - 1)))
    inside, outside = (statistics.median(times) for times in zip(*pairs, strict=True))
    share = statistics.median(max(0.0, 1 - a / b) for a, b in pairs)
    return {"step in generate, ms": inside, "step in stream, ms": outside, "host's share of a step": share}


def show(result: dict[str, Any], console: Console) -> None:
    table = Table("", "measured", "target", title=f"Start-up; steps of the {result['model']} model")
    for name, value in result.items():
        if name == "model":
            continue
        target = TARGETS.get(name)
        met = "" if target is None else f"<= {target:g} {'ok' if value <= target else 'MISSED'}"
        table.add_row(name, f"{value:.3g}", met)
    console.print(table)
