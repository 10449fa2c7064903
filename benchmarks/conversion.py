"""Conversion at size: memory from /proc and throughput against `cp -r` of the same files, in one run.

A random checkpoint of Flash's shapes is written, copied, converted by `dsv4 convert` in a process of its own, copied
again, and the result verified against the source. Caches are dropped before each step where the machine allows. `cp`
returns while data still waits in memory to be written and the converter does not, so both of cp's times are given: to
its return, and until its data is on disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoints.shards import DTYPES
from checkpoints.synth import official_tensors, synth, with_layers
from dsv4_jax.config import ModelConfig
from dsv4_jax.presets import PRESETS

LEAST_BYTES = 10e9  # smaller ones say little about a whole model
TARGETS = {"anonymous_gib": 2.5, "throughput_of_cp": 0.6}
SAMPLE_SECONDS = 0.02
ROOT = Path(__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", choices=sorted(PRESETS), default="flash", help="whose shapes")
    parser.add_argument("--layers", type=int, default=2, help="layers kept, beside MTP layer, embedding and head")
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's temporary directory")
    parser.add_argument("--workers", type=int, help="of the converter; default its own choice")
    parser.add_argument("--max-memory", default="2GiB", help="of the converter")
    parser.add_argument("--small", action="store_true", help=f"allow less than {LEAST_BYTES / 1e9:.0f} GB, for a trial")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; seconds, bytes and GB/s (1e9). Everything written is deleted again."""
    config = with_layers(PRESETS[args.config], args.layers)
    nbytes = checkpoint_bytes(config)
    if nbytes < LEAST_BYTES and not args.small:
        raise ValueError(f"--layers {args.layers} makes {nbytes / 1e9:.1f} GB, less than {LEAST_BYTES / 1e9:.0f} GB")
    with tempfile.TemporaryDirectory(prefix="dsv4-conversion-", dir=args.directory) as scratch:
        need, free = 3 * nbytes + (1 << 30), shutil.disk_usage(scratch).free
        if need > free:
            raise ValueError(f"{scratch}: needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; --directory")
        return measure(Path(scratch), config, nbytes, args)


def checkpoint_bytes(config: dict[str, Any]) -> int:
    total = 0
    for dtype, shape in official_tensors(ModelConfig.from_dict(config)).values():
        count = DTYPES[dtype].itemsize
        for side in shape:
            count *= side
        total += count
    return total


def measure(scratch: Path, config: dict[str, Any], nbytes: int, args: argparse.Namespace) -> dict[str, Any]:
    source, copy, converted = scratch / "source", scratch / "copy", scratch / "converted"
    synth(config, source)
    cold = drop_caches()
    before = copied(source, copy)
    drop_caches()
    command = ["convert", source, converted, "--max-memory", args.max_memory]
    command += ["--workers", args.workers] if args.workers else []
    convert = watched(command)
    flushed = timed(os.sync)
    drop_caches()
    after = copied(source, copy)
    drop_caches()
    verify = watched(["verify", converted, "--against", source])
    fastest = min(before["seconds"], after["seconds"])
    fastest_flushed = min(before["flushed_seconds"], after["flushed_seconds"])
    return {
        "bytes": nbytes,
        "cold_caches": cold,
        "convert": convert | {"sync_afterwards_seconds": flushed, "gb_per_s": nbytes / convert["seconds"] / 1e9},
        "verify": verify | {"gb_per_s": nbytes / verify["seconds"] / 1e9},
        "cp": [before, after],
        "throughput_of_cp": fastest / convert["seconds"],
        "throughput_of_cp_flushed": fastest_flushed / (convert["seconds"] + flushed),
        "targets": TARGETS,
    }


def copied(source: Path, copy: Path) -> dict[str, float]:
    """Seconds of `cp -r`, and until what it wrote is on disk; the copy is deleted."""
    seconds = timed(lambda: subprocess.run(["cp", "-r", source, copy], check=True))
    flushing = timed(os.sync)
    shutil.rmtree(copy)
    os.sync()
    return {"seconds": seconds, "flushed_seconds": seconds + flushing}


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def drop_caches() -> bool:
    """Have the kernel forget what it read; whether it did (only root may ask)."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def watched(command: list[object]) -> dict[str, Any]:
    """Run a `dsv4` command; its seconds and the most anonymous memory seen, sampled from /proc."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "dsv4_jax.cli", *map(str, command)], env=env, stdout=errors, stderr=errors
        )
        while process.poll() is None:
            peak = max(peak, anonymous_kib(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"dsv4 {command[0]} failed: {errors.read().strip()}")
    return {"seconds": seconds, "anonymous_gib": peak / 2**20}


def anonymous_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def show(result: dict[str, Any], console: Console) -> None:
    table = Table("", "seconds", "GB/s", "anonymous memory", title=f"{result['bytes'] / 1e9:.1f} GB of tensors")
    for column in table.columns[1:]:
        column.justify = "right"
    for number, copy in enumerate(result["cp"], 1):
        seconds = copy["seconds"]
        table.add_row(f"cp -r ({number})", f"{seconds:.1f}", f"{result['bytes'] / seconds / 1e9:.2f}", "")
        table.add_row("  until on disk", f"{copy['flushed_seconds']:.1f}", "", "")
    for name in ("convert", "verify"):
        row, label = result[name], {"convert": "dsv4 convert", "verify": "dsv4 verify --against"}[name]
        memory = f"{row['anonymous_gib']:.2f} GiB"
        table.add_row(label, f"{row['seconds']:.1f}", f"{row['gb_per_s']:.2f}", memory)
    console.print(table)
    memory, ratio, flushed = (
        result["convert"]["anonymous_gib"],
        result["throughput_of_cp"],
        result["throughput_of_cp_flushed"],
    )
    console.print(
        f"memory {memory:.2f} GiB (at most {TARGETS['anonymous_gib']}), throughput {ratio:.0%} of the faster cp "
        f"(at least {TARGETS['throughput_of_cp']:.0%}), {flushed:.0%} with cp's data on disk; "
        f"caches {'dropped before each step' if result['cold_caches'] else 'not dropped: that needs root'}"
    )
