"""What the kernels should take, from the vendors' compilers alone: no TPU or GPU is needed, and no time is measured.

On TPUs, estimate = max(static cycles / clock, bytes / HBM bandwidth). The cycles are libtpu's own schedule of the
kernel, with its copies; they ignore contention for HBM. Bytes and FLOPs are those the operation cannot do without,
counted by hand; roofline = the longer of bytes at peak bandwidth and FLOPs at peak rate (fp8 peak where 8-bit operands
meet an MXU that is faster with them). `around` is XLA's estimate for what it does before and after the kernel. With
`--peer`, the public TPU inference package's kernel for the same job stands beside ours (`benchmarks.peer_tpu`).

On GPUs, what ptxas says: registers of a thread, spilled bytes, shared memory of a block; and what these leave room for,
blocks on one multiprocessor and their share of the threads it can hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks import peer_tpu
from benchmarks.copies import leave_out_copies
from dsv4_jax.experts import block_rows
from pallas_kernels.aot import Case, roofline_seconds, run_cases
from pallas_kernels.chips import TPUS, Chip, chip
from pallas_kernels.compressor_pool import pool_window_tpu
from pallas_kernels.expert_matmul.gpu import expert_matmul_gpu
from pallas_kernels.expert_matmul.tpu import expert_matmul_tpu
from pallas_kernels.expert_rows import add_rows_tpu, expert_hidden_tpu
from pallas_kernels.fp8_matmul.gpu import fp8_matmul_gpu, grouped_output_projection_gpu
from pallas_kernels.fp8_matmul.tpu import fp8_matmul_tpu, fp8_matmuls_tpu, grouped_output_projection_tpu
from pallas_kernels.head_norm import norm_heads_tpu
from pallas_kernels.hyper_connection import collapse_tpu, expand_tpu
from pallas_kernels.index_rows import empty_index_rows
from pallas_kernels.index_topk import index_topk_tpu
from pallas_kernels.index_topk import tuning as index_tuning
from pallas_kernels.index_topk.gpu import index_topk_gpu
from pallas_kernels.kv_rows import empty_rows
from pallas_kernels.put_rows import put_rows_tpu
from pallas_kernels.rms_norm import rms_norm_tpu
from pallas_kernels.round_index import encode_index_tpu, round_index_tpu
from pallas_kernels.round_rows import round_rows_tpu
from pallas_kernels.routing import arrange_pairs_tpu, route_tpu
from pallas_kernels.sparse_mla import FirstN, Window
from pallas_kernels.sparse_mla import tpu_kernel as mla_kernel
from pallas_kernels.sparse_mla import tuning as mla_tuning
from pallas_kernels.sparse_mla.gpu import sparse_mla_gpu
from pallas_kernels.sparse_mla.tpu import sparse_mla_tpu
from pallas_kernels.store_rows import store_rows_tpu

HEAD_DIM, ROPE_DIM, WINDOW, INDEX_HEADS, INDEX_DIM, STREAMS = 512, 64, 128, 64, 128, 4
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
    run = fp8_matmul_tpu if target.platform == "tpu" else fp8_matmul_gpu
    return lambda *args: run(*args, chip=target), args


def fp8_matmuls(target: Chip, rows: int, Q: int, K: int):
    """q_a and kv: one kernel on a TPU, two on a GPU."""
    weights = [(array(jnp.float8_e4m3fn, N, K), array(jnp.uint8, N // 128, K // 128)) for N in (Q, HEAD_DIM)]
    args = array(jnp.bfloat16, rows, K), weights
    if target.platform == "tpu":
        return lambda x, weights: fp8_matmuls_tpu(x, weights, chip=target), args
    return lambda x, weights: [fp8_matmul_gpu(x, *weight, chip=target) for weight in weights], args


def grouped_output_projection(target: Chip, rows: int, H: int, G: int, rank: int):
    N, K, tables = G * rank, H // G * HEAD_DIM, array(jnp.float32, rows, 1, ROPE_DIM // 2)
    weights = array(jnp.float8_e4m3fn, N, K), array(jnp.uint8, N // 128, K // 128)
    args = array(jnp.bfloat16, rows, 1, H, HEAD_DIM), tables, tables, *weights
    run = grouped_output_projection_tpu if target.platform == "tpu" else grouped_output_projection_gpu
    return lambda *args: run(*args, groups=G, chip=target), args


def expert_matmul(target: Chip, rows: int, blocks: int, N: int, K: int):
    weights = array(jnp.uint8, blocks, N, K // 2), array(jnp.uint8, blocks, N, K // 32)
    args = array(jnp.bfloat16, rows * blocks, K), array(jnp.int32, blocks), *weights
    run = expert_matmul_tpu if target.platform == "tpu" else expert_matmul_gpu
    return lambda x, expert, *w: run(x, expert, blocks, *w, packed=True, chip=target), args


def sparse_mla(target: Chip, B: int, T: int, H: int, N: int):
    """Every query sees N entries, in a loop of as many blocks as that is: data decide otherwise.

    The profiler knows no copies of a kernel's own on v7x; there they count as bytes alone.
    """
    held = T + WINDOW - 1
    kv = lambda n: array(jnp.bfloat16, B, n, HEAD_DIM)
    window = Window(kv(held), array(jnp.int32, B, held), WINDOW, is_band=T > 16)
    args = array(jnp.bfloat16, B, T, H, HEAD_DIM), array(jnp.int32, B, T), window, kv(N), FirstN(array(jnp.int32, B, T))
    args = (*args, array(jnp.float32, H))
    if target.platform == "cuda":
        return lambda *args: sparse_mla_gpu(*args, scale=HEAD_DIM**-0.5, chip=target), args
    if target.generation >= 7:
        leave_out_copies(mla_kernel)
    config = mla_tuning.default_config(target, B, T, H, N)
    config = dataclasses.replace(config, trips=math.ceil(N / config.block))
    return lambda *args: sparse_mla_tpu(*args, scale=HEAD_DIM**-0.5, chip=target, config=config), args


def index_topk(target: Chip, B: int, T: int, N: int, top_k: int):
    """On a TPU the worst case of its searches: data decide otherwise."""
    q = array(jnp.bfloat16, B, T, INDEX_HEADS, INDEX_DIM)
    keys = jax.eval_shape(lambda: empty_index_rows((B, N, INDEX_DIM)))
    args = q, array(jnp.float32, B, T, INDEX_HEADS), keys, array(jnp.int32, B, T)
    if target.platform == "cuda":
        return lambda *args: index_topk_gpu(*args, top_k=top_k, chip=target).index, args
    config = dataclasses.replace(index_tuning.default_config(T, N, target, B), data_dependent=False)
    return lambda *args: index_topk_tpu(*args, top_k=top_k, chip=target, config=config), args


def norm_heads(target: Chip, rows: int, H: int):
    table = array(jnp.float32, rows, 1, ROPE_DIM // 2)
    run = lambda *args: norm_heads_tpu(*args, eps=1e-6, chip=target)
    return run, (array(jnp.bfloat16, rows, 1, H, HEAD_DIM), table, table)


def rms_norm(target: Chip, rows: int, D: int):
    run = lambda x, w: rms_norm_tpu(x, w, eps=1e-6, chip=target)
    return run, (array(jnp.bfloat16, rows, D), array(jnp.float32, D))


def store_rows(target: Chip, rows: int):
    table = array(jnp.float32, rows, 1, ROPE_DIM // 2)
    run = lambda *args: store_rows_tpu(*args, eps=1e-6, chip=target)
    return run, (array(jnp.bfloat16, rows, 1, HEAD_DIM), array(jnp.float32, HEAD_DIM), table, table)


def round_rows(target: Chip, rows: int, K: int):
    return lambda x: round_rows_tpu(x, chip=target), (array(jnp.bfloat16, rows, K),)


def round_index(target: Chip, rows: int):
    table = array(jnp.float32, rows, 1, ROPE_DIM // 2)
    run = lambda *args: round_index_tpu(*args, chip=target)
    return run, (array(jnp.bfloat16, rows, INDEX_HEADS, INDEX_DIM), table, table)


def encode_index(target: Chip, rows: int):
    table = array(jnp.float32, rows, 1, ROPE_DIM // 2)
    return lambda *args: encode_index_tpu(*args, chip=target), (array(jnp.bfloat16, rows, 1, INDEX_DIM), table, table)


def route(target: Chip, rows: int, E: int, A: int):
    run = lambda *args: route_tpu(*args, top_k=A, factor=1.5, chip=target)
    return run, (array(jnp.float32, rows, E), array(jnp.float32, E))


def arrange_pairs(target: Chip, rows: int, E: int, A: int):
    run = lambda *args: arrange_pairs_tpu(*args, experts=E, rows=block_rows(rows * A, E), chip=target)
    return run, (array(jnp.int32, rows, A), array(jnp.float32, rows, A))


def expert_hidden(target: Chip, rows: int, F: int):
    run = lambda *args: expert_hidden_tpu(*args, limit=10.0, rounded=True, chip=target)
    return run, (array(jnp.bfloat16, rows, 2 * F), array(jnp.float32, rows, 1))


def add_rows(target: Chip, rows: int, A: int, M: int):
    args = array(jnp.bfloat16, rows * A, M), array(jnp.int32, rows, A)
    return lambda *args: add_rows_tpu(*args, chip=target), args


def collapse(target: Chip, rows: int, M: int):
    n, elements = STREAMS, (2 + STREAMS) * STREAMS
    args = array(jnp.bfloat16, rows, 1, n, M), array(jnp.float32, elements, n * M), array(jnp.float32, elements)
    run = lambda *args: collapse_tpu(*args, iterations=20, eps=1e-6, rms_eps=1e-6, chip=target)
    return run, (*args, array(jnp.float32, 3), array(jnp.float32, M))  # with the norm of what it gives


def expand(target: Chip, rows: int, M: int):
    streams, weights = array(jnp.bfloat16, rows, 1, STREAMS, M), array(jnp.float32, rows, 1, (2 + STREAMS) * STREAMS)
    return lambda *args: expand_tpu(*args, chip=target), (array(jnp.bfloat16, rows, 1, M), streams, weights)


def put_rows(target: Chip, B: int, N: int):
    held, fresh = (jax.eval_shape(lambda n=n: empty_rows((B, n, HEAD_DIM), ROPE_DIM)) for n in (N, 1))
    return lambda *args: put_rows_tpu(*args, chip=target), (held, fresh, array(jnp.int32, B, 1))


def pool_window(target: Chip, B: int, ratio: int, D: int):
    """Every sequence completes an entry."""
    overlap = ratio == 4
    ring, at = array(jnp.float32, B, ratio * (1 + overlap), D * (1 + overlap)), array(jnp.int32, B)
    options: dict[str, Any] = {"ratio": ratio, "overlap": overlap, "dtype": jnp.bfloat16, "chip": target}
    return lambda *args: pool_window_tpu(*args, **options), (ring, ring, at, at)


def every_work() -> Iterator[Work]:
    for name, m in MODELS.items():
        for rows in (1, 64, PREFILL):
            yield from dense_work(name, m, rows)
            yield from row_work(name, m, rows)
        for rows, blocks in ((1, m.A), (4, 32), (128, 8)):  # some blocks, each of an expert of its own
            yield from expert_work(name, m, rows, blocks)
        yield from attention_work(name, m)


def phase_of(rows: int) -> str:
    return "prefill" if rows >= PREFILL else "decode"


def dense_work(name: str, m: Model, rows: int) -> Iterator[Work]:
    """The products of one layer's attention with FP8 weights."""
    shapes = {
        "q_a, kv": (m.Q + HEAD_DIM, m.M),
        "q_b": (m.H * HEAD_DIM, m.Q),
        "index q_b": (INDEX_HEADS * INDEX_DIM, m.Q),
        "o_b": (m.M, m.G * m.O),
    }
    for shape, (N, K) in shapes.items():
        nbytes = N * K + N * K // 128**2 + 2 * rows * (N + K)
        op, sizes = "fp8_matmul", {"rows": rows, "N": N, "K": K}
        if shape == "q_a, kv":
            op, sizes = "fp8_matmuls", {"rows": rows, "Q": m.Q, "K": K}
        yield Work(op, name, shape, phase_of(rows), sizes, nbytes, 2 * rows * N * K, fp8=True)
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
        nbytes = B * (N * (INDEX_DIM // 2 + INDEX_DIM // 32) + T * INDEX_HEADS * (2 * INDEX_DIM + 4) + 4 * T * m.top_k)
        flops = 2 * B * T * INDEX_HEADS * INDEX_DIM * N
        sizes = {"B": B, "T": T, "N": N, "top_k": m.top_k}
        yield Work("index_topk", name, "CSA", "decode" if T == 1 else "prefill", sizes, nbytes, flops)


def row_work(name: str, m: Model, rows: int) -> Iterator[Work]:
    """What reads and writes tokens, and does little with them."""
    phase = phase_of(rows)
    heads = {"rows": rows, "H": m.H}
    yield Work("norm_heads", name, "q", phase, heads, rows * (4 * m.H * HEAD_DIM + 4 * ROPE_DIM), 0)
    yield Work("rms_norm", name, "q_a", phase, {"rows": rows, "D": m.Q}, 4 * rows * m.Q + 4 * m.Q, 0)
    nbytes = rows * (2 * HEAD_DIM + 4 * ROPE_DIM + 584) + 4 * HEAD_DIM
    yield Work("store_rows", name, "kv", phase, {"rows": rows}, nbytes, 0)
    for shape, K in {"x": m.M, "o": m.G * m.O}.items():
        yield Work("round_rows", name, shape, phase, {"rows": rows, "K": K}, 4 * rows * K, 0)
    yield Work("round_index", name, "q", phase, {"rows": rows}, 4 * rows * INDEX_HEADS * INDEX_DIM, 0)
    sizes, mix = {"rows": rows, "M": m.M}, (2 + STREAMS) * STREAMS
    nbytes = 2 * rows * (STREAMS + 1) * m.M + 4 * mix * (STREAMS * m.M + rows) + 4 * m.M
    yield Work("collapse", name, "streams", phase, sizes, nbytes, 2 * rows * mix * STREAMS * m.M)
    yield Work("expand", name, "streams", phase, sizes, rows * (2 * (2 * STREAMS + 1) * m.M + 4 * mix), 0)
    yield Work("route", name, "scores", phase, {"rows": rows, "E": m.E, "A": m.A}, rows * (4 * m.E + 8 * m.A), 0)
    hidden = {"rows": rows * m.A, "F": m.F}
    yield Work("expert_hidden", name, "pairs", phase, hidden, rows * m.A * (6 * m.F + 4), 0)
    if phase == "decode":
        pairs = {"rows": rows, "E": m.E, "A": m.A}
        yield Work("arrange_pairs", name, "pairs", phase, pairs, 4 * rows * m.A * 5, 0)
        sums = {"rows": rows, "A": m.A, "M": m.M}
        yield Work("add_rows", name, "pairs", phase, sums, rows * m.M * (2 * m.A + 4), 0)
        yield Work("put_rows", name, "entries", phase, {"B": rows, "N": 8192}, 2 * 584 * rows, 0)
        yield Work("encode_index", name, "keys", phase, {"rows": rows}, (2 * 128 + 68) * rows, 0)
        for shape, (ratio, D) in {"CSA": (4, HEAD_DIM), "index": (4, INDEX_DIM), "HCA": (128, HEAD_DIM)}.items():
            nbytes = 8 * rows * D * ratio * (4 if ratio == 4 else 1)  # kv and gates; two windows of two halves
            yield Work("pool_window", name, shape, phase, {"B": rows, "ratio": ratio, "D": D}, nbytes + 2 * rows * D, 0)


def known(work: Work, name: str) -> dict[str, Any]:
    """A row of the result before anything is compiled."""
    target = chip(name)
    roofline = roofline_seconds(target, hbm_bytes=work.bytes, flops=work.flops, fp8=work.fp8)
    times = {"roofline_us": roofline * 1e6, "hbm_us": work.bytes / target.hbm_bytes_per_s * 1e6}
    return {**dataclasses.asdict(work), "chip": name, **times}


def estimate(works: list[Work], name: str, timeout: float) -> list[dict[str, Any]]:
    """Rows of a TPU; `error` or `notes` say what could not be had."""
    cases = [Case(f"benchmarks.kernels:{work.op}", work.sizes) for work in works]
    alone = [dataclasses.replace(case, kernels_alone=True) for case in cases]
    limit = timeout * len(cases)
    compiled = run_cases(cases, name, timeout=limit)
    profiled = run_cases(alone, name, profile=("cycles",), timeout=limit)
    triples = zip(works, compiled, profiled, strict=True)
    return [known(work, name) | _times(known(work, name), chip(name), *reports) for work, *reports in triples]


def _times(row: dict[str, Any], target: Chip, compiled: dict[str, Any], profiled: dict[str, Any]) -> dict[str, Any]:
    """What the compiler's reports on a program, and on its kernels alone, add to a row."""
    if "error" in compiled:
        return {"error": compiled["error"]}
    around = {"around_us": compiled["xla_cycles"] / target.clock_hz * 1e6}
    kernels = profiled.get("kernels", {}).items()
    cycles = [k["static_cycles"] for op, k in kernels if is_kernel(op) and "static_cycles" in k]
    if not cycles:
        return around | {"notes": [profiled.get("error", "the profiler wrote no cycles"), *profiled.get("notes", [])]}
    static = sum(cycles) / target.clock_hz * 1e6
    took = max(static, row["hbm_us"])
    return around | {"static_us": static, "estimate_us": took, "ratio": took / row["roofline_us"]}


# That have kernels for GPUs.
GPU_OPS = "fp8_matmul", "fp8_matmuls", "grouped_output_projection", "expert_matmul", "sparse_mla", "index_topk"
GPUS = "H200", "B200"
SM_REGISTERS, SM_THREADS, SM_BLOCKS, RESERVED = 1 << 16, 2048, 32, 1 << 10  # RESERVED: bytes of a block's shared memory


def resources(works: list[Work], name: str, timeout: float) -> list[dict[str, Any]]:
    """Rows of a GPU: what ptxas says of the kernel, or `error`."""
    cases = [Case(f"benchmarks.kernels:{work.op}", work.sizes) for work in works]
    rows = []
    for work, report in zip(works, run_cases(cases, name, timeout=timeout * len(cases)), strict=True):
        kernels = list(report.get("kernels", {}).values())
        if "error" in report or not kernels:
            found = {"error": report.get("error", "there is no Mosaic kernel in the program")}
        else:
            found = kernels[0] | occupancy(kernels[0], chip(name))
        rows.append(known(work, name) | found)
    return rows


def occupancy(kernel: dict[str, int], target: Chip) -> dict[str, Any]:
    """The most blocks of a kernel that one multiprocessor holds, and their share of the threads it can hold."""
    threads = kernel["threads"]
    bounds = {
        "registers": SM_REGISTERS // (threads * kernel["registers"]),
        "shared memory": (target.smem_bytes + RESERVED) // (kernel["smem_bytes"] + RESERVED),
        "threads": SM_THREADS // threads,
        "blocks": SM_BLOCKS,
    }
    bound = min(bounds, key=lambda name: bounds[name])
    return {"blocks_per_sm": bounds[bound], "occupancy": bounds[bound] * threads / SM_THREADS, "bound": bound}


KERNEL_NAMES = (
    "fp8_matmul", "fp8_output_projection", "expert_matmul", "sparse_mla", "index_topk", "index_picks", "norm_heads",
    "rms_norm", "store_rows", "round_rows", "round_index", "hyper_connection", "put_rows", "pool_window",
    "encode_index", "route", "arrange_pairs", "expert_hidden", "add_rows",
)  # fmt: skip


def is_kernel(op: str) -> bool:
    """Whether an HLO op's name is that of a Pallas kernel; copies that XLA adds are not."""
    return op.startswith(KERNEL_NAMES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ops, chips = sorted({work.op for work in every_work()}), [*TPUS, *GPUS]
    parser.add_argument("--chips", nargs="+", choices=chips, default=chips, help="TPU generations and GPUs")
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops, help="kernels")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--phases", nargs="+", choices=("decode", "prefill"), default=["decode", "prefill"])
    parser.add_argument("--rows", nargs="+", type=int, help="only shapes with so many rows (default: all)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds the compiler may take for one row")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at work side by side")
    parser.add_argument("--peer", action="store_true", help="also the public TPU inference package's kernels")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of op x shape x chip; needs libtpu and CUDA's compiler (AotUnavailable, a RuntimeError, says what to
    install)."""
    if args.peer:
        peer_tpu.require_peer()
    works = [
        work
        for work in every_work()
        if work.op in args.ops and work.model in args.models and work.phase in args.phases
        if not args.rows or work.sizes.get("rows") in args.rows
    ]
    batches = [
        (name, batch)
        for name in args.chips
        for op in args.ops
        if name in TPUS or op in GPU_OPS
        if (batch := [work for work in works if work.op == op])
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda batch: _measure(*batch, args.timeout, args.peer), batches)
        rows = [row for rows in found for row in rows]
    order = {(work.op, work.model, work.shape, *work.sizes.items()): i for i, work in enumerate(works)}
    return {"rows": sorted(rows, key=lambda r: order[r["op"], r["model"], r["shape"], *r["sizes"].items()])}


def _measure(name: str, works: list[Work], timeout: float, peer: bool) -> list[dict[str, Any]]:
    rows = (estimate if name in TPUS else resources)(works, name, timeout)
    if peer and name in TPUS:
        rows = peer_tpu.beside(rows, name, timeout)
    for row in rows:
        told = row.get("ratio", row.get("registers", "nothing"))
        print(f"{row['op']} {row['model']} {row['shape']} {row['sizes']} {name}: {told}", file=sys.stderr, flush=True)
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    console.print(_tpu_table([row for row in result["rows"] if row["chip"] in TPUS]))
    console.print(_gpu_table([row for row in result["rows"] if row["chip"] in GPUS]))
    for row in result["rows"]:
        if "error" in row or "notes" in row:
            console.print(f"{row['op']} {row['sizes']} {row['chip']}: {row.get('error') or row['notes']}", markup=False)
        if "peer_error" in row:
            console.print(f"{row['op']} {row['sizes']} {row['chip']}: the peer: {row['peer_error']}", markup=False)


def _tpu_table(rows: list[dict[str, Any]]) -> Table:
    figures = ("MB", "GFLOP", "roofline us", "static us", "estimate us", "ratio", "around us")
    peer = ("peer us", "peer ratio") if any("peer_differs" in row for row in rows) else ()
    table = Table("kernel", "model", "shape", "chip", *figures, *peer, title="TPU kernels by schedule; nothing was run")
    for row in rows:
        times = _cells(row, ".1f", "roofline_us", "static_us", "estimate_us")
        compared = [*_cells(row, ".1f", "peer_us"), *_cells(row, ".2f", "peer_ratio")] if peer else []
        table.add_row(*_work_cells(row), *times, *_cells(row, ".2f", "ratio", "around_us"), *compared)
    return table


def _gpu_table(rows: list[dict[str, Any]]) -> Table:
    figures = ("MB", "GFLOP", "roofline us", "registers", "spilled", "shared KiB", "threads", "blocks", "occupancy")
    table = Table(
        "kernel", "model", "shape", "chip", *figures, "bound by", title="GPU kernels by ptxas; nothing was run"
    )
    for row in rows:
        kib = row | {"smem_kib": row["smem_bytes"] / 1024} if "smem_bytes" in row else row
        used = _cells(kib, ".0f", "registers", "spill_bytes", "smem_kib", "threads", "blocks_per_sm")
        roofline, share = _cells(row, ".1f", "roofline_us"), _cells(row, ".0%", "occupancy")
        table.add_row(*_work_cells(row), *roofline, *used, *share, row.get("bound", "-"))
    return table


def _work_cells(row: dict[str, Any]) -> list[str]:
    sizes = " ".join(f"{key}={value}" for key, value in row["sizes"].items() if key in ("rows", "blocks", "B", "T"))
    amounts = f"{row['bytes'] / 1e6:.1f}", f"{row['flops'] / 1e9:.2f}"
    return [row["op"], row["model"], f"{row['shape']} {sizes}", row["chip"], *amounts]


def _cells(row: dict[str, Any], form: str, *names: str) -> list[str]:
    return [f"{row[name]:{form}}" if row.get(name) is not None else "-" for name in names]
