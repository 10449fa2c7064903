"""What the TPU kernels should take, from the vendor's compiler alone: no TPU is needed, and no time here is measured.

estimate = max(static cycles / clock, bytes / HBM bandwidth). The cycles are libtpu's own schedule of the kernel, with
its copies; they ignore contention for HBM. Bytes and FLOPs are those the operation cannot do without, counted by hand;
roofline = the longer of bytes at peak bandwidth and FLOPs at peak rate (fp8 peak where 8-bit operands meet an MXU that
is faster with them). `around` is XLA's estimate for what it does before and after the kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pallas_kernels.aot import Case, roofline_seconds, run_cases
from pallas_kernels.chips import TPUS, Chip, chip
from pallas_kernels.expert_matmul.tpu import expert_matmul_tpu
from pallas_kernels.fp8_matmul.tpu import fp8_matmul_tpu, grouped_output_projection_tpu
from pallas_kernels.index_topk import index_topk_tpu
from pallas_kernels.index_topk import tuning as index_tuning
from pallas_kernels.sparse_mla import FirstN, Window
from pallas_kernels.sparse_mla import tuning as mla_tuning
from pallas_kernels.sparse_mla.tpu import sparse_mla_tpu

HEAD_DIM, ROPE_DIM, WINDOW, INDEX_HEADS, INDEX_DIM = 512, 64, 128, 64, 128
PREFILL = 512  # tokens of a chunk; the profiler unrolls the grid, so longer ones take it minutes


@dataclass(frozen=True)
class Model:
    """Sizes as in config.json, by their letters."""

    M: int
    H: int
    Q: int
    G: int
    O: int  # noqa: E741
    E: int
    A: int
    F: int
    top_k: int


MODELS = {
    "Flash": Model(M=4096, H=64, Q=1024, G=8, O=1024, E=256, A=6, F=2048, top_k=512),
    "Pro": Model(M=7168, H=128, Q=1536, G=16, O=1024, E=384, A=6, F=3072, top_k=1024),
}


@dataclass(frozen=True)
class Work:
    """A kernel at a shape: `program` of this module called with `sizes`, and what it cannot do without.

    fp8: 8-bit operands may go at the fp8 peak.
    """

    op: str
    model: str
    shape: str
    phase: str
    sizes: dict[str, int]
    bytes: int
    flops: int
    fp8: bool = False


def array(dtype, *shape: int) -> Any:
    """An operand without values."""
    return jax.ShapeDtypeStruct(shape, dtype)


def fp8_matmul(target: Chip, rows: int, N: int, K: int):
    args = array(jnp.bfloat16, rows, K), array(jnp.float8_e4m3fn, N, K), array(jnp.uint8, N // 128, K // 128)
    return lambda *args: fp8_matmul_tpu(*args, chip=target), args


def grouped_output_projection(target: Chip, rows: int, H: int, G: int, rank: int):
    N, K, tables = G * rank, H // G * HEAD_DIM, array(jnp.float32, rows, 1, ROPE_DIM // 2)
    weights = array(jnp.float8_e4m3fn, N, K), array(jnp.uint8, N // 128, K // 128)
    args = array(jnp.bfloat16, rows, 1, H, HEAD_DIM), tables, tables, *weights
    return lambda *args: grouped_output_projection_tpu(*args, groups=G, chip=target), args


def expert_matmul(target: Chip, rows: int, blocks: int, N: int, K: int):
    weights = array(jnp.uint8, blocks, N, K // 2), array(jnp.uint8, blocks, N, K // 32)
    args = array(jnp.bfloat16, rows * blocks, K), array(jnp.int32, blocks), array(jnp.int32), *weights
    return lambda *args: expert_matmul_tpu(*args, packed=True, chip=target), args


def sparse_mla(target: Chip, B: int, T: int, H: int, N: int):
    """Every query sees N entries, in a loop of as many blocks as that is: data decide otherwise."""
    config = mla_tuning.default_config(target, B, T, H, N)
    config = dataclasses.replace(config, trips=math.ceil(N / config.block))
    held = T + WINDOW - 1
    kv = lambda n: array(jnp.bfloat16, B, n, HEAD_DIM)
    window = Window(kv(held), array(jnp.int32, B, held), WINDOW, is_band=T > 16)
    args = array(jnp.bfloat16, B, T, H, HEAD_DIM), array(jnp.int32, B, T), window, kv(N), FirstN(array(jnp.int32, B, T))
    run = lambda *args: sparse_mla_tpu(*args, scale=HEAD_DIM**-0.5, chip=target, config=config)
    return run, (*args, array(jnp.float32, H))


def index_topk(target: Chip, B: int, T: int, N: int, top_k: int):
    """The worst case of its searches: data decide otherwise."""
    config = dataclasses.replace(index_tuning.default_config(T, N, target), data_dependent=False)
    q, keys = array(jnp.bfloat16, B, T, INDEX_HEADS, INDEX_DIM), array(jnp.bfloat16, B, N, INDEX_DIM)
    run = lambda *args: index_topk_tpu(*args, top_k=top_k, chip=target, config=config)
    return run, (q, array(jnp.float32, B, T, INDEX_HEADS), keys, array(jnp.int32, B, T))


def every_work() -> Iterator[Work]:
    for name, m in MODELS.items():
        for rows in (1, 64, PREFILL):
            yield from dense_work(name, m, rows)
        for rows, blocks in ((1, m.A), (4, 32), (128, 8)):  # some blocks, each of an expert of its own
            yield from expert_work(name, m, rows, blocks)
        yield from attention_work(name, m)


def phase_of(rows: int) -> str:
    return "prefill" if rows >= PREFILL else "decode"


def dense_work(name: str, m: Model, rows: int) -> Iterator[Work]:
    """The products of one layer's attention with FP8 weights."""
    shapes = {"q_a": (m.Q, m.M), "q_b": (m.H * HEAD_DIM, m.Q), "kv": (HEAD_DIM, m.M), "o_b": (m.M, m.G * m.O)}
    for shape, (N, K) in shapes.items():
        nbytes = N * K + N * K // 128**2 + 2 * rows * (N + K)
        sizes = {"rows": rows, "N": N, "K": K}
        yield Work("fp8_matmul", name, shape, phase_of(rows), sizes, nbytes, 2 * rows * N * K, fp8=True)
    inputs, outputs, weights = m.H * HEAD_DIM, m.G * m.O, m.O * m.H * HEAD_DIM
    nbytes = weights + weights // 128**2 + 2 * rows * (inputs + outputs) + 4 * rows * ROPE_DIM
    sizes = {"rows": rows, "H": m.H, "G": m.G, "rank": m.O}
    flops = 2 * rows * weights
    yield Work("grouped_output_projection", name, "o_a", phase_of(rows), sizes, nbytes, flops, fp8=True)


def expert_work(name: str, m: Model, rows: int, blocks: int) -> Iterator[Work]:
    for shape, (N, K) in {"gate_up": (2 * m.F, m.M), "down": (m.M, m.F)}.items():
        nbytes = blocks * (N * K // 2 + N * K // 32 + 2 * rows * (N + K))
        sizes = {"rows": rows, "blocks": blocks, "N": N, "K": K}
        phase = "prefill" if rows >= 64 else "decode"
        yield Work("expert_matmul", name, shape, phase, sizes, nbytes, 2 * rows * blocks * N * K, fp8=True)


def attention_work(name: str, m: Model) -> Iterator[Work]:
    for B, T, N in ((4, 1, 4096), (1, PREFILL, 1024)):
        held = T + WINDOW - 1
        nbytes = 2 * HEAD_DIM * B * (2 * T * m.H + held + N)
        flops = 4 * B * T * m.H * HEAD_DIM * (WINDOW + N)
        sizes = {"B": B, "T": T, "H": m.H, "N": N}
        yield Work("sparse_mla", name, "HCA", phase_of(T), sizes, nbytes, flops)
    for B, T, N in ((4, 1, 16384), (1, 128, 16384)):
        nbytes = B * (2 * N * INDEX_DIM + T * INDEX_HEADS * (2 * INDEX_DIM + 4) + 4 * T * m.top_k)
        flops = 2 * B * T * INDEX_HEADS * INDEX_DIM * N
        sizes = {"B": B, "T": T, "N": N, "top_k": m.top_k}
        yield Work("index_topk", name, "CSA", "decode" if T == 1 else "prefill", sizes, nbytes, flops)


def estimate(work: Work, name: str, timeout: float) -> dict[str, Any]:
    """One row of the result; `error` or `notes` say what could not be had."""
    target, case = chip(name), Case(f"benchmarks.kernels:{work.op}", work.sizes)
    row = {**dataclasses.asdict(work), "chip": name}
    roofline = roofline_seconds(target, hbm_bytes=work.bytes, flops=work.flops, fp8=work.fp8)
    row["roofline_us"], row["hbm_us"] = roofline * 1e6, work.bytes / target.hbm_bytes_per_s * 1e6
    whole = run_cases([case], name, timeout=timeout)[0]
    if "error" in whole:
        return row | {"error": whole["error"]}
    row["around_us"] = whole["xla_cycles"] / target.clock_hz * 1e6
    alone = run_cases([dataclasses.replace(case, kernels_alone=True)], name, profile=True, timeout=timeout)[0]
    cycles = [
        k["static_cycles"] for op, k in alone.get("kernels", {}).items() if is_kernel(op) and "static_cycles" in k
    ]
    if not cycles:
        return row | {"notes": [alone.get("error", "the profiler wrote no cycles"), *alone.get("notes", [])]}
    static = sum(cycles) / target.clock_hz
    took = max(static, work.bytes / target.hbm_bytes_per_s)
    return row | {"static_us": static * 1e6, "estimate_us": took * 1e6, "ratio": took / roofline}


KERNEL_NAMES = ("fp8_matmul", "fp8_output_projection", "expert_matmul", "sparse_mla", "index_topk", "index_picks")


def is_kernel(op: str) -> bool:
    """Whether an HLO op's name is that of a Pallas kernel; copies that XLA adds are not."""
    return op.startswith(KERNEL_NAMES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ops = sorted({work.op for work in every_work()})
    parser.add_argument("--chips", nargs="+", choices=TPUS, default=list(TPUS), help="TPU generations")
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops, help="kernels")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--phases", nargs="+", choices=("decode", "prefill"), default=["decode", "prefill"])
    parser.add_argument("--rows", nargs="+", type=int, help="only shapes with so many rows (default: all)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds the compiler may take for one row")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of op x shape x chip; needs libtpu (AotUnavailable, a RuntimeError, says what to install)."""
    rows = []
    for work in every_work():
        wanted = work.op in args.ops and work.model in args.models and work.phase in args.phases
        if wanted and (not args.rows or work.sizes.get("rows") in args.rows):
            for name in args.chips:
                rows.append(estimate(work, name, args.timeout))
                print(
                    f"{work.op} {work.model} {work.shape} {work.sizes} {name}: {rows[-1].get('ratio')}", file=sys.stderr
                )
    return {"rows": rows}


def show(result: dict[str, Any], console: Console) -> None:
    figures_of = ("MB", "GFLOP", "roofline us", "static us", "estimate us", "ratio", "around us")
    table = Table("kernel", "model", "shape", "chip", *figures_of, title="TPU kernels by schedule; nothing was run")
    for row in result["rows"]:
        sizes = " ".join(f"{key}={value}" for key, value in row["sizes"].items() if key in ("rows", "blocks", "B", "T"))
        figures = [f"{row[key]:.1f}" if key in row else "-" for key in ("roofline_us", "static_us", "estimate_us")]
        ratio, around = (f"{row[key]:.2f}" if key in row else "-" for key in ("ratio", "around_us"))
        work = f"{row['bytes'] / 1e6:.1f}", f"{row['flops'] / 1e9:.2f}"
        table.add_row(row["op"], row["model"], f"{row['shape']} {sizes}", row["chip"], *work, *figures, ratio, around)
    console.print(table)
    for row in result["rows"]:
        if "error" in row or "notes" in row:
            console.print(f"{row['op']} {row['sizes']} {row['chip']}: {row.get('error') or row['notes']}", markup=False)
