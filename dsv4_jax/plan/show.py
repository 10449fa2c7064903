"""A plan as tables for people, and a sweep as a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv4_jax.plan.report import Plan, sweep
from dsv4_jax.plan.topology import Topology

GIB = 2**30


def print_plan(found: Plan, name: str, console: Console) -> None:
    """Memory, steps, collectives and the verdict."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    title = (
        f"{name} on {found.topology} ({found.devices} devices: {mesh}), {found.batch} sequences of {found.context:,}"
    )
    console.print(title)
    table = Table()
    for column in ("a device", "GiB"):
        table.add_column(column, justify="left" if column == "a device" else "right")
    table.add_row("weights", f"{found.weights / GIB:.2f}")
    table.add_row("cache", f"{found.cache / GIB:.2f}")
    for step in ("decode", "prefill"):
        measured = getattr(found, step)
        if "temporaries" in measured:
            table.add_row(f"temporaries of {step}", f"{measured['temporaries'] / GIB:.2f}")
    table.add_row("needed", f"{found.needed / GIB:.2f}")
    table.add_row("there is", f"{found.hbm / GIB:.2f}")
    console.print(table)
    console.print(
        f"A decode step takes at least {found.step_seconds * 1e3:.2f} ms (peak bandwidth and products), "
        f"so at most {found.tokens_per_second:,.0f} tokens/s in all."
    )
    for step in ("decode", "prefill"):
        measured = getattr(found, step)
        if "temporaries" in measured:
            kinds = [f"{v['count']} {k} ({v['bytes'] / 2**20:.1f} MiB)" for k, v in measured["collectives"].items()]
            seconds = measured["trace_seconds"] + measured["compile_seconds"]
            console.print(f"{step}: compiled in {seconds:.0f} s; collectives: {', '.join(kinds) or 'none'}")
    for error in found.errors:
        console.print(f"[red]{error}")
    console.print("It fits." if found.fits else f"It does not fit: {found.suggestion}.")


def sweep_rows(
    fields: dict[str, Any], topology: Topology, batch: int, context: int, found: Plan, **options: Any
) -> list[dict[str, Any]]:
    """Batches 1, 4, 16 .. and contexts 4,096, 16,384 .. up to those given."""
    temporaries = found.needed - found.weights - found.cache
    batches, contexts = _steps(1, batch), _steps(min(4096, context), context)
    return sweep(fields, topology, batches, contexts, temporaries=temporaries, **options)


def _steps(first: int, last: int) -> list[int]:
    values = [first]
    while values[-1] * 4 < last:
        values.append(values[-1] * 4)
    return [*values, last] if values[-1] != last else values


def print_sweep(rows: list[dict[str, Any]], console: Console) -> None:
    """One line a point; nothing without points."""
    if not rows:
        return
    console.print("Sweep: weights and cache exact, temporaries as above, speed a bound.")
    table = Table()
    for column in ("batch", "context", "GiB a device", "fits", "step, ms", "tokens/s"):
        table.add_column(column, justify="right")
    for row in rows:
        fits = "yes" if row["fits"] else "no"
        size, step = f"{row['needed'] / GIB:.1f}", f"{row['step_seconds'] * 1e3:.2f}"
        table.add_row(str(row["batch"]), f"{row['context']:,}", size, fits, step, f"{row['tokens_per_second']:,.0f}")
    console.print(table)


def draw(rows: list[dict[str, Any]], found: Plan, title: str, file: Path) -> None:
    """Memory a device, and the bound on tokens/s, against the batch, a line for each context.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--chart needs matplotlib: pip install 'dsv4-jax[notebook]'") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    for context in sorted({row["context"] for row in rows}):
        line = [row for row in rows if row["context"] == context]
        batches, label = [row["batch"] for row in line], f"{context:,} tokens"
        memory.plot(batches, [row["needed"] / GIB for row in line], marker="o", label=label)
        speed.plot(batches, [row["tokens_per_second"] for row in line], marker="o", label=label)
    memory.axhline(found.hbm / GIB, color="black", linestyle="--", label="memory of a device")
    memory.set(xlabel="sequences", ylabel="GiB a device", xscale="log", title="memory", ylim=(0, None))
    speed.set(xlabel="sequences", ylabel="tokens/s", xscale="log", yscale="log", title="upper bound of decoding")
    memory.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
