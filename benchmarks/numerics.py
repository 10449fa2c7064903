"""What low precision does to the logits: KL(exact || other) in nats over the golden models, beside the references' own.

`exact` is the golden output itself: dequantised weights in float32, nothing else rounded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import checkpoints
import dsv4_jax

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"numerics": "exact"},
    "official": {"numerics": "official"},
    "exact, fp8 cache": {"numerics": "exact", "cache_dtype": "fp8"},
    "official, fp8 cache": {"numerics": "official", "cache_dtype": "fp8"},
    "exact, bfloat16": {"numerics": "exact", "dtype": jnp.bfloat16},
    "official, bfloat16": {"numerics": "official", "dtype": jnp.bfloat16},
}
# KL that the references have with rounding: emulated in float32, and the published code in bfloat16.
REFERENCE = {"tiny": (0.52, 0.58), "yarn": (0.08, 0.08), "wide": (0.12, 0.11), "calm": (0.04, 0.04)}
LIMIT = 1.5  # times the reference's KL, for official numerics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="directory of golden cases (default: the tests')")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Mean KL over the positions of the first row of each quantised case's `forward`."""
    cases = sorted(p.parent for p in args.golden.glob("*/fp8*/config.json"))
    cases = [path for path in cases if path.with_name(f"{path.name}.forward.npz").exists()]
    if not cases:
        raise ValueError(f"{args.golden}: no quantised golden case with its forward outputs")
    return {"limit": LIMIT, "kl": {f"{path.parent.name}/{path.name}": measure(path) for path in cases}}


def measure(path: Path) -> dict[str, float | None]:
    want = np.load(path.with_name(f"{path.name}.forward.npz"))
    ids, exact = want["input_ids"][:1], want["logits"][:1]
    found: dict[str, float | None] = {}
    for name, options in VARIANTS.items():
        model = checkpoints.load(path, max_tokens=ids.shape[1], **({"dtype": jnp.float32} | options))
        found[name] = mean_kl(exact, dsv4_jax.logits(model, ids))
    reference = REFERENCE.get(path.parent.name, (None, None))
    return found | dict(zip(("references, float32", "references, bfloat16"), reference, strict=True))


def mean_kl(want, got) -> float:
    """KL(want || got) of logits [..., V] in nats, averaged over positions."""
    logs = [np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True) for x in (want, got)]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logs)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def show(result: dict[str, Any], console: Console) -> None:
    cases = result["kl"]
    table = Table("KL(exact || ...)", *cases)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in next(iter(cases.values())):
        table.add_row(name, *(_cell(name, case) for case in cases.values()))
    console.print(table)
    console.print(f"official numerics should stay under {result['limit']} times the references' figure")


def _cell(name: str, case: dict[str, float | None]) -> str:
    value, reference = case[name], case["references, float32"]
    if value is None:
        return "-"
    missed = name == "official" and reference is not None and value > LIMIT * reference
    return f"{value:.2g}" + (" MISSED" if missed else "")
