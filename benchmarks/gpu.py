"""The kernels on the NVIDIA GPU at hand: right first, then microseconds, GB/s and TFLOP/s beside XLA's own path.

Each kernel is compared with its contract at a small shape before anything is timed; a wrong one ends the run. A time is
that of a program of several calls, over their number: the calls have operands of their own, together more than the L2
cache holds, so that weights and rows come from memory. Bytes and flops are counted by hand: what any implementation
must read, write and multiply. Meant to end within 8 minutes; shapes that would start later are left out and named.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from dsv4_jax.kernels import XlaKernels, grouped_output
from dsv4_jax.quantized import FP4_BLOCK, QuantizedArray, dequantize
from dsv4_jax.rope import Rotation
from pallas_kernels.chips import MOSAIC_GPUS, Chip, chip_of, require
from pallas_kernels.expert_matmul import expert_matmul
from pallas_kernels.expert_matmul.gpu import expert_matmul_gpu
from pallas_kernels.fp8_matmul import fp8_matmul, grouped_output_projection
from pallas_kernels.fp8_matmul.gpu import fp8_matmul_gpu, grouped_output_projection_gpu
from pallas_kernels.index_rows import dequantize_index_rows, quantize_index_rows
from pallas_kernels.index_topk import pick_entries, pick_entries_xla
from pallas_kernels.index_topk.gpu import index_topk_gpu
from pallas_kernels.kv_rows import quantize_rows
from pallas_kernels.sparse_mla import Indices, Window, sparse_mla, sparse_mla_xla
from pallas_kernels.sparse_mla.gpu import sparse_mla_gpu

BUDGET_S = 7 * 60  # after which no further shape is begun
RING_BYTES, MOST_CALLS = 128 << 20, 32  # what the calls of a program read in all, at least; how many there are, at most
ROUNDS, SECONDS = 5, 0.1  # the median of so many rounds counts, each about that long
TOLERANCE = 2**-7  # of the largest value: one rounding to bfloat16 and sums in another order
DIM, ROPE, WINDOW = 512, 64, 128
# What is asked for on an H200.
TARGETS = {"sparse_mla decode": ("gb_per_s", 2400), "sparse_mla prefill": ("tflop_per_s", 350),
           "fp8_matmul 4096^3": ("tflop_per_s", 800)}  # fmt: skip

Operands = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    make: (key, calls) -> operands of so many calls. kernel, portable: ours and XLA's, on the operands of one call.
    nbytes, flops: the least a call reads and writes, and multiplies and adds. target: a key of TARGETS.
    """

    name: str
    make: Callable[[jax.Array, int], list[Operands]]
    kernel: Callable[..., jax.Array]
    portable: Callable[..., jax.Array]
    nbytes: float
    flops: float
    target: str | None = None


def normal(key, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def codes(key, *shape: int) -> jax.Array:
    """float8_e4m3fn below 2 in magnitude, none of them NaN."""
    return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8) & 0xBF, jnp.float8_e4m3fn)


def exponents(key, *shape: int) -> jax.Array:
    """e8m0 bytes from 2 ** -7 to 2 ** 0."""
    return jax.random.randint(key, shape, 120, 128).astype(jnp.uint8)


def several(make: Callable[[jax.Array], Operands]) -> Callable[[jax.Array, int], list[Operands]]:
    """Operands that no two calls share."""
    return lambda key, calls: [make(k) for k in jax.random.split(key, calls)]


def fp8_case(target: Chip, rows: int, N: int, K: int, coded: bool, asked: str | None = None) -> Case:
    """x [rows, K], codes or bfloat16, times FP8 weights [N, K]; XLA expands both."""

    def make(key) -> Operands:
        a, b, c, d = jax.random.split(key, 4)
        weight = codes(b, N, K), exponents(c, N // 128, K // 128)
        return (codes(a, rows, K), *weight, exponents(d, rows, K // 128)) if coded else (normal(a, rows, K), *weight)

    def kernel(x, w, scale, x_scale=None):
        return fp8_matmul_gpu(x, w, scale, x_scale=x_scale, chip=target)

    def portable(x, w, scale, x_scale=None):
        wide = x if x_scale is None else dequantize(QuantizedArray(x, x_scale, (1, 128)), jnp.bfloat16)
        return XlaKernels().project(wide, QuantizedArray(w, scale))

    nbytes = rows * K * (1 if coded else 2) + N * K + 2 * rows * N
    name = f"fp8_matmul, {rows} rows of {'codes' if coded else 'bf16'}, weights {N} x {K}"
    return Case(name, several(make), kernel, portable, nbytes, 2 * rows * N * K, asked)


def output_case(target: Chip, rows: int, heads: int = 64, groups: int = 8, rank: int = 1024) -> Case:
    """Inverse RoPE and the grouped product."""
    N, K = groups * rank, heads // groups * DIM

    def make(key) -> Operands:
        a, b, c, d = jax.random.split(key, 4)
        angles = jax.random.uniform(b, (1, rows, ROPE // 2), maxval=6.0)
        weight = codes(c, N, K), exponents(d, N // 128, K // 128)
        return normal(a, 1, rows, heads, DIM), jnp.cos(angles), jnp.sin(angles), *weight

    def portable(o, cos, sin, w, scale):
        return grouped_output(o, Rotation(cos, sin), QuantizedArray(w, scale), groups)

    kernel = functools.partial(grouped_output_projection_gpu, groups=groups, chip=target)
    nbytes = 2 * rows * heads * DIM + N * K + 2 * rows * N
    return Case(f"output projection, {rows} rows", several(make), kernel, portable, nbytes, 2 * rows * N * K)


def expert_case(target: Chip, rows: int, blocks: int, N: int, K: int, experts: int = 256) -> Case:
    """Blocks of rows, each with FP4 weights of its expert; XLA expands one expert at a time."""

    def make(key, calls: int) -> list[Operands]:
        a, b, *keys = jax.random.split(key, 2 + calls)
        weight = jax.random.bits(a, (experts, N, K // 2), jnp.uint8), exponents(b, experts, N, K // 32)
        return [(normal(k, rows * blocks, K), chosen(k), jnp.int32(blocks), *weight) for k in keys]

    def chosen(key):
        order = jax.random.permutation(key, experts)
        return jnp.sort(jnp.resize(order, (blocks,))).astype(jnp.int32)

    def portable(x, block_expert, blocks_used, w, scale):
        def product(block):
            part, expert = block
            return XlaKernels().project(part, QuantizedArray(w[expert], scale[expert], FP4_BLOCK, packed=True))

        return jax.lax.map(product, (x.reshape(blocks, rows, K), block_expert)).reshape(-1, N)

    kernel = functools.partial(expert_matmul_gpu, packed=True, chip=target)
    nbytes = min(blocks, experts) * N * K * (1 / 2 + 1 / 32) + 2 * rows * blocks * (N + K)
    name = f"expert_matmul, {blocks} blocks of {rows}, FP4 weights {N} x {K}"
    return Case(name, make, kernel, portable, nbytes, 2 * rows * blocks * N * K)


def attention_case(
    target: Chip, B: int, T: int, entries: int, picks: int, asked: str | None, fp8: bool = False, heads: int = 64
) -> Case:
    """Each query attends to its window and to `picks` of `entries` rows."""
    slots = T + WINDOW - 1
    scale = DIM**-0.5

    def make(key, calls: int) -> list[Operands]:
        a, b, c, *keys = jax.random.split(key, 3 + calls)
        pools: tuple[Any, ...] = normal(a, B, slots, DIM), normal(b, B, entries, DIM)
        if fp8:
            pools = tuple(quantize_rows(pool, ROPE) for pool in pools)
        held = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (B, slots))
        window = Window(pools[0], held, WINDOW, is_band=True)
        sinks = jax.random.normal(c, (heads,))
        return [(normal(k, B, T, heads, DIM), held[:, -T:], window, pools[1], chosen(k), sinks) for k in keys]

    def chosen(key):
        """Distinct rows for a query, from all over the pool."""
        step, spread = entries // picks, jax.random.randint(key, (B, T, picks), 0, entries // picks)
        return Indices(jnp.arange(picks, dtype=jnp.int32) * step + spread)

    row_bytes = DIM - ROPE + (DIM - ROPE) // 64 + 2 * ROPE if fp8 else 2 * DIM
    rows_read = B * (T * (WINDOW + picks) if T == 1 else slots + entries)  # at prefill queries may share them
    name = f"sparse_mla, {B} x {T} queries of {heads} heads, {picks} of {entries} {'FP8' if fp8 else 'bf16'} rows"
    return Case(
        name, make,
        functools.partial(sparse_mla_gpu, scale=scale, chip=target), functools.partial(sparse_mla_xla, scale=scale),
        rows_read * row_bytes + 4 * B * T * heads * DIM, 4 * B * T * heads * DIM * (WINDOW + picks), asked,
    )  # fmt: skip


def index_case(target: Chip, B: int, T: int, entries: int, top_k: int = 512) -> Case:
    """Picks among 4-bit keys. All values are small integers, hence scores exact and the picks the same everywhere."""

    def make(key) -> Operands:
        a, b, c = jax.random.split(key, 3)
        integers = lambda key, *shape: jax.random.randint(key, shape, -4, 5).astype(jnp.bfloat16)
        keys = quantize_index_rows(integers(a, B, entries, 128) // 2 * 2)  # all of which e2m1 has
        visible = jnp.full((B, T), entries, jnp.int32)
        return integers(b, B, T, 64, 128), integers(c, B, T, 64), keys, visible

    return Case(
        f"index_topk, {B} x {T} queries, {top_k} of {entries} FP4 keys", several(make),
        lambda *args: index_topk_gpu(*args, top_k=top_k, chip=target).index, ascending(pick_entries_xla, top_k),
        B * (68 * entries + T * (64 * 130 * 2 + 4 * top_k)), 2 * B * T * 64 * 128 * entries,
    )  # fmt: skip


def ascending(pick: Callable[..., Any], top_k: int) -> Callable[..., jax.Array]:
    """What `pick` picks, in the kernel's order; there are `top_k` to be picked."""
    wide = dequantize_index_rows
    return lambda q, weights, keys, seen: jnp.sort(pick(q, weights, wide(keys, q.dtype), seen, top_k=top_k).index, -1)


def timed_cases(target: Chip) -> list[Case]:
    """Flash's shapes: decode of 1 and 64 sequences, chunks of prefill."""
    fp8 = functools.partial(fp8_case, target)
    cases = [fp8(rows, N, K, False) for rows in (1, 64) for N, K in ((1024, 4096), (32768, 1024), (4096, 8192))]
    cases += [fp8(4096, 4096, 4096, coded, "fp8_matmul 4096^3" if coded else None) for coded in (False, True)]
    cases += [fp8(4096, 32768, 1024, coded) for coded in (False, True)]
    cases += [output_case(target, rows) for rows in (1, 64, 4096)]
    cases += [expert_case(target, *load, 4096, K) for load in ((1, 6), (2, 200), (128, 256)) for K in (4096, 2048)]
    decode, prefill = "sparse_mla decode", "sparse_mla prefill"
    cases += [attention_case(target, B, 1, 16384, 512, decode if B > 1 else None) for B in (1, 64)]
    cases += [attention_case(target, 64, 1, 16384, 512, None, fp8=True)]
    cases += [attention_case(target, 1, 4096, 8192, 512, prefill)]
    cases += [index_case(target, *shape) for shape in ((1, 1, 262144), (64, 1, 16384), (1, 2048, 16384))]
    return cases


def checked_cases(target: Chip) -> list[tuple[Case, Callable[..., jax.Array]]]:
    """Small shapes, and the contract of each."""

    def fp8(x, w, scale, x_scale=None):
        return fp8_matmul(x, w, scale, x_scale=x_scale)

    experts = functools.partial(expert_matmul, packed=True)
    checks: list[tuple[Case, Callable[..., jax.Array]]]
    checks = [(fp8_case(target, *shape, coded), fp8) for coded in (False, True)
              for shape in ((1, 512, 1024), (48, 256, 4096), (640, 2048, 512))]  # fmt: skip
    checks += [(output_case(target, 5), functools.partial(grouped_output_projection, groups=8))]
    checks += [(expert_case(target, *load, 512, 1024, experts=16), experts) for load in ((1, 6), (24, 10), (128, 16))]
    attention = functools.partial(sparse_mla, scale=DIM**-0.5)
    shapes = ((3, 1, 1024, 256), (1, 100, 1024, 256))
    checks += [(attention_case(target, *s, None, fp8=f), attention) for s in shapes for f in (False, True)]
    checks += [(index_case(target, *s), ascending(pick_entries, 512)) for s in ((1, 1, 9000), (2, 7, 3000))]
    return checks


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """Largest difference over the largest value; not a number where `got` has one."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def check(case: Case, reference: Callable[..., jax.Array]) -> dict[str, Any]:
    """Compare the kernel with its contract.

    Raises:
      RuntimeError: it is wrong.
    """
    [operands] = case.make(jax.random.key(0), 1)
    error = relative_error(jax.jit(case.kernel)(*operands), jax.jit(reference)(*operands))
    if not error <= TOLERANCE:
        raise RuntimeError(f"{case.name}: differs from the reference by {error:.2g} of the largest value")
    return {"name": case.name, "error": error}


def program(function: Callable[..., jax.Array]) -> Callable[[list[Operands]], list[jax.Array]]:
    """One compiled program that calls `function` on each of a list of operands."""
    return jax.jit(lambda calls: [function(*operands) for operands in calls])


def seconds_per_call(function: Callable[..., jax.Array], calls: list[Operands]) -> float:
    """Median over rounds, each of as many programs as fill it, queued at once."""
    run = program(function)
    jax.block_until_ready(run(calls))
    once = elapsed(run, calls, 1)
    repeats = max(1, min(200, round(SECONDS / once)))
    return statistics.median(elapsed(run, calls, repeats) for _ in range(ROUNDS)) / repeats / len(calls)


def elapsed(run: Callable, calls: list[Operands], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        out = run(calls)
    jax.block_until_ready(out)
    return time.perf_counter() - began


def measure(case: Case) -> dict[str, Any]:
    """Both paths at one shape, and how far their results are apart."""
    count = max(1, min(MOST_CALLS, round(RING_BYTES / case.nbytes)))
    calls = case.make(jax.random.key(1), count)
    outputs = [jax.jit(path)(*calls[0]) for path in (case.kernel, case.portable)]
    result: dict[str, Any] = {"name": case.name, "apart": relative_error(*outputs)}
    for path in ("kernel", "portable"):
        seconds = seconds_per_call(getattr(case, path), calls)
        rates = {"gb_per_s": case.nbytes / seconds / 1e9, "tflop_per_s": case.flops / seconds / 1e12}
        result[path] = {"us": seconds * 1e6} | rates
    if case.target:
        unit, least = TARGETS[case.target]
        result["target"] = {"unit": unit, "least": least, "met": result["kernel"][unit] >= least}
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="time only the kernels whose name contains this")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check, then time.

    Raises:
      RuntimeError: there is no GPU, or a kernel is wrong. ValueError: no kernel is for this GPU.
    """
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        raise RuntimeError(f"needs an NVIDIA GPU (H100, H200 or B200); the first device is {device.device_kind!r}")
    target = chip_of(device)
    require(target, "benchmarks gpu", platform="cuda", generations=MOSAIC_GPUS)
    began = time.perf_counter()
    checks = [check(*case) for case in checked_cases(target)]
    shapes, left_out = [], []
    for case in timed_cases(target):
        if args.only not in case.name:
            continue
        if time.perf_counter() - began > BUDGET_S:
            left_out.append(case.name)
        else:
            shapes.append(measure(case))
    spent = time.perf_counter() - began
    return {"gpu": device.device_kind, "checks": checks, "shapes": shapes, "left_out": left_out, "seconds": spent}


def show(result: dict[str, Any], console: Console) -> None:
    worst = max(found["error"] for found in result["checks"])
    console.print(f"{result['gpu']}: {len(result['checks'])} checks right, worst {worst:.1e} of the largest value")
    table = Table("kernel and shape", "us", "GB/s", "TFLOP/s", "XLA us", "times as fast", "apart", "target")
    for row in result["shapes"]:
        ours, xla, asked = row["kernel"], row["portable"], row.get("target")
        wanted = f"{asked['least']} {'met' if asked['met'] else 'MISSED'}" if asked else ""
        figures = (ours["us"], ours["gb_per_s"], ours["tflop_per_s"], xla["us"])
        ratio = f"{xla['us'] / ours['us']:.2f}"
        table.add_row(row["name"], *(f"{x:,.1f}" for x in figures), ratio, f"{row['apart']:.0e}", wanted)
    console.print(table)
    for name in result["left_out"]:
        console.print(f"left out, time was up: {name}")
    console.print(f"{result['seconds']:.0f} s")
