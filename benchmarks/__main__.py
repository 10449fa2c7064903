"""`python -m benchmarks NAME [--json] [--save]`: one front door to every benchmark."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

# Name -> (module, what it measures). A module has add_arguments(parser), run(args) -> dict and show(result, console).
BENCHMARKS = {
    "numerics": ("benchmarks.numerics", "what rounding activations and caches does to the golden models' logits"),
    "cpu": ("benchmarks.cpu_model", "prefill and decode on this CPU against transformers and the machine's floors"),
    "quantised": ("benchmarks.quantised", "decode and memory in FP8 and FP4 beside float32, on this CPU"),
    "kernels": ("benchmarks.kernels", "estimated times of the TPU kernels beside the roofline; needs libtpu, no TPU"),
    "gpu": ("benchmarks.gpu", "the kernels on an NVIDIA GPU, right first, then fast, beside XLA's own path"),
    "demo": ("benchmarks.demo", "the bundled checkpoint on unseen text, against a 5-gram model; needs the extra train"),
    "compile": ("benchmarks.compile_time", "tracing and lowering a decode step of 8 layers and of 43"),
    "slices": ("benchmarks.slices", "the smallest slices that serve Flash and Pro, their steps compiled for them"),
    "step": ("benchmarks.step", "a decode step on TPUs that are not there, part by part, beside what memory allows"),
    "startup": ("benchmarks.startup", "seconds to an import and to the first token; what Python costs a step"),
    "long": ("benchmarks.long_context", "a decode step and the memory of a prefill at 65,536 tokens on this CPU"),
    "conversion": ("benchmarks.conversion", "dsv4 convert: memory, and throughput against cp -r of the same files"),
}
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def hardware() -> dict[str, Any]:
    """The processor, its cores and the memory of this machine."""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    kilobytes = [int(line.split()[1]) for line in _lines(meminfo) if line.startswith("MemTotal")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(kilobytes[0] / 2**20, 1) if kilobytes else None,
        "system": platform.system(),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def versions() -> dict[str, str]:
    """Of Python, the numerical packages and this repository's commit."""
    found = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return found | ({"commit": commit.stdout.strip()} if commit.returncode == 0 else {})


def save(name: str, result: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Write results/<name>-<date>.json, or <name>-<variant>-<date>; a second run of the same day replaces the first."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{'-'.join([name, *filter(None, [result.get('variant')]), result['date']])}.json"
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(unfinished, path)
    return path


def main(argv: list[str] | None = None) -> int:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    shared.add_argument("--save", action="store_true", help="also write benchmarks/results/NAME-DATE.json")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure this project.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    modules = {}
    for name, (module, summary) in BENCHMARKS.items():
        modules[name] = importlib.import_module(module)
        modules[name].add_arguments(names.add_parser(name, parents=[shared], help=summary, description=summary))
    args = parser.parse_args(argv)
    try:
        measured = modules[args.name].run(args)
    except (ValueError, RuntimeError) as error:
        print(f"benchmarks {args.name}: {error}", file=sys.stderr)
        return 1
    about = {"benchmark": args.name, "date": datetime.date.today().isoformat()}
    result = about | {"hardware": hardware(), "versions": versions()} | measured
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        modules[args.name].show(measured, Console(width=None if sys.stdout.isatty() else 120))
    if args.save:
        print(f"saved {save(args.name, result)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
