"""Kernels of vLLM's public TPU package that do the jobs of ours, compiled and estimated the same way.

The package cannot be imported without vLLM, so the modules of its kernels are imported without its `__init__`, and a
silent logger stands in for vLLM's. A function here has the name and the sizes of one of `benchmarks.kernels`.

Two releases are looked at together: the newest, and the last one made for the compiler that is pinned here, because the
newest has moved its grouped matmul (gmm_v2) to a build of tokamax that no package index has.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import itertools
import math
import pkgutil
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.copies import leave_out_copies
from pallas_kernels.aot import Case, run_cases
from pallas_kernels.chips import Chip, chip

RELEASES = "0.32.0", "0.25.0"
DIRECTORIES = [f"build/peer-{release}" for release in RELEASES]
COMMANDS = [
    f"pip install --no-deps --target {directory} tpu-inference=={release}"
    for release, directory in zip(RELEASES, DIRECTORIES, strict=True)
]
# What the peer's kernel does otherwise; the operations that are not here have no peer, or none that does the same.
DIFFERS = {
    "fp8_matmul": "rounds activations in the kernel; sizes of its table's nearest shape",
    "fp8_matmuls": "two kernels, which round activations; sizes of its table's nearest shape",
    "grouped_output_projection": "a scale a channel, not one for 128 x 128; weights turned",
    "expert_matmul": "float32 scales; FP8 codes where the chip has no FP4, twice the bytes",
    "sparse_mla": "two kernels, of which starts and waits of copies are not counted; entries in pages",
    "collapse": "Sinkhorn and the norm are left to XLA and not counted",
    "expand": "weights in two arrays",
}
HEAD_DIM, WINDOW, STREAMS, SCALED, GROUP = 512, 128, 4, 128, 32
PAGE, WINDOW_PAGE = 64, 128  # entries; larger than vLLM's, which favours the peer
FP8, FP4 = jnp.float8_e4m3fn, jnp.float4_e2m1fn


class PeerMissing(RuntimeError):
    """The peer's package is not installed."""


def require_peer() -> None:
    """Raise PeerMissing, naming the commands, unless the package is there."""
    if "tpu_inference" in sys.modules or importlib.util.find_spec("tpu_inference") is not None:
        return
    steps = [*COMMANDS, f"export PYTHONPATH={':'.join(DIRECTORIES)}"]
    raise PeerMissing("--peer needs the public TPU inference package: " + " && ".join(steps))


def peer_module(name: str) -> Any:
    """tpu_inference.kernels.`name`, from the first release on the path that has it."""
    if "tpu_inference.logger" not in sys.modules:
        require_peer()
        package, logger = types.ModuleType("tpu_inference"), types.ModuleType("tpu_inference.logger")
        package.__path__ = pkgutil.extend_path([], "tpu_inference")
        vars(logger)["init_logger"] = lambda name: types.SimpleNamespace(warning_once=lambda *args: None)
        sys.modules |= {"tpu_inference": package, "tpu_inference.logger": logger}
    *packages, module = f"kernels.{name}".split(".")
    path = "tpu_inference"
    for part in packages:
        path = f"{path}.{part}"
        package = importlib.import_module(path)
        package.__path__ = pkgutil.extend_path(package.__path__, path)
    return importlib.import_module(f"{path}.{module}")


def array(dtype: Any, *shape: int) -> Any:
    """An operand without values."""
    return jax.ShapeDtypeStruct(shape, dtype)


def fp8_matmul(target: Chip, rows: int, N: int, K: int):
    tuned = peer_module("quantized_matmul.tuned_block_sizes")
    tuned.get_tpu_version = lambda: target.generation  # it would ask the default device
    kernel = peer_module("quantized_matmul.blockwise_kernel").quantized_matmul_kernel
    sizes = nearest_sizes(tuned, rows, N, K)
    run = functools.partial(kernel, block_size=SCALED, x_q_dtype=FP8, tuned_value=sizes)
    args = array(jnp.bfloat16, rows, K), array(FP8, N, K), array(jnp.float32, K // SCALED, 1, N)
    return lambda *args: run(*args), args


def fp8_matmuls(target: Chip, rows: int, Q: int, K: int):
    """q_a and kv."""
    (q_a, (x, *q_weights)), (kv, (_, *kv_weights)) = (fp8_matmul(target, rows, N, K) for N in (Q, HEAD_DIM))
    return lambda x, q_weights, kv_weights: (q_a(x, *q_weights), kv(x, *kv_weights)), (x, q_weights, kv_weights)


def nearest_sizes(tuned: Any, rows: int, N: int, K: int) -> Any:
    """The table's sizes for the FP8 shape most like this one that they divide, all rows in one block.

    Its default, 128 for each size, is many times slower.
    """

    def rank(key, value):
        distance = sum(abs(math.log2(a / b)) for a, b in ((key.n_batch, rows), (key.n_out, N), (key.n_in, K)))
        return value.out_block_size > N or value.in_block_size > K, distance  # those to be cut come last

    table = sorted(
        (*rank(key, value), tuned.TunedValue(max(rows, 16), min(value[1], N), min(value[2], K), value[3]))
        for key, value in tuned.TUNED_BLOCK_SIZES.items()
        if key.x_q_dtype == key.w_q_dtype == jnp.dtype(FP8).name
    )
    sizes = [size for *_, size in table]  # the kernel walks over tiles of 256 columns
    return next(s for s in sizes if N % s[1] == K % s[2] == s[1] % 256 == 0)


def grouped_output_projection(target: Chip, rows: int, H: int, G: int, rank: int):
    kernel = peer_module("experimental.deepseek_v4.o_projection").wo_a_projection
    weights = array(FP8, H // G * HEAD_DIM, G * rank), array(jnp.float32, G * rank)
    args = array(jnp.bfloat16, rows, H, HEAD_DIM), *weights, array(jnp.float32, rows, 2 * 128)
    return lambda *args: kernel(*args), args


def expert_matmul(target: Chip, rows: int, blocks: int, N: int, K: int):
    gmm = peer_module("megablox.gmm_v2")
    # It counts its steps from the sizes of the groups, which are data.
    gmm.fill_metadata = lambda *refs, cfgs: blocks * math.ceil(rows / cfgs.tiles.tile_m)
    codes = array(FP4 if target.generation >= 7 else FP8, blocks, K, N)
    scales = array(jnp.float32, blocks, K // GROUP, 1, N)
    run = lambda *args: gmm.gmm_v2(*args, zero_initialize=False)
    return run, (array(jnp.bfloat16, rows * blocks, K), codes, array(jnp.int32, blocks), scales)


def sparse_mla(target: Chip, B: int, T: int, H: int, N: int):
    if not hasattr(pltpu, "reciprocal"):  # the name is newer than the pinned jax
        vars(pltpu)["reciprocal"] = pl.reciprocal
    window, entries = (peer_module(f"experimental.deepseek_v4.core_attention.{name}") for name in ("mla_swa", "mla"))
    held, tokens = T + WINDOW - 1, B * T
    starts, sequences = lambda i: i * T, lambda i: (0, B)[i]
    with_known_lengths(window, T, B, {0: lambda i: held, 2: starts, 3: sequences})
    with_known_lengths(entries, T, B, {0: lambda i: N, 3: starts, 4: sequences})
    blocks = {"num_queries_per_block": (1, 32, 32), "chunk_prefill_size": T if T > 1 else None}
    options = blocks | {"sm_scale": HEAD_DIM**-0.5}

    def run(q, fresh, cache, pages, kv, kv_pages, lengths, limits, offsets, split, sinks):
        part, cache, total, top = window.mla_sliding_window_ragged_paged_attention(
            q, fresh, cache, lengths, pages, offsets, split, sinks, sliding_window=WINDOW, q_compute_block_size=4,
            logical_page_size=WINDOW_PAGE, num_kv_pages_per_block=2, unnormalized_output=True, **options,
        )  # fmt: skip
        out = entries.mla_ragged_paged_attention(
            q, kv, lengths, limits, kv_pages, offsets, split, sinks, part, total, top, num_kv_pages_per_block=16,
            **options,
        )  # fmt: skip
        return out, cache

    ints = functools.partial(array, jnp.int32)
    cache = lambda pages, entries: (array(jnp.uint8, pages, 2 * entries, 4, 128), ints(pages))
    caches = *cache(B * math.ceil(held / WINDOW_PAGE), WINDOW_PAGE), *cache(B * math.ceil(N / PAGE), PAGE)
    tokens_of = array(jnp.bfloat16, tokens, H, HEAD_DIM), array(jnp.bfloat16, tokens, HEAD_DIM)
    return run, (*tokens_of, *caches, ints(B), ints(tokens), ints(B + 1), ints(3), array(jnp.float32, H))


class Known:
    """Stands for an operand of scalars, and gives values known when the kernel is compiled."""

    def __init__(self, ref: Any, value: Any) -> None:
        self.shape, self.value = ref.shape, value

    def __getitem__(self, index: Any) -> Any:
        return self.value(index)


def with_known_lengths(module: Any, T: int, sequences: int, values: dict[int, Any]) -> None:
    """Let kernels of the module be called with these scalars known; those for other phases return what they were given.

    The profiler counts one turn of a loop whose end it does not know, and cannot follow copies of unknown length: these
    are left out, which favours the peer.
    """
    wanted = "-d-" if T == 1 else "-p-"

    def pallas_call(kernel, *, grid_spec, input_output_aliases, name, **options):
        if wanted not in name:
            given = sorted(input_output_aliases, key=lambda i: input_output_aliases[i])
            return lambda *args: args[given[0]] if len(given) == 1 else [args[i] for i in given]

        def knowing(*refs):
            return kernel(*(Known(ref, values[i]) if i in values else ref for i, ref in enumerate(refs)))

        grid_spec = copy.copy(grid_spec)
        object.__setattr__(grid_spec, "grid", (sequences,))
        options |= {"input_output_aliases": input_output_aliases, "name": name}
        return pl.pallas_call(knowing, grid_spec=grid_spec, **options)

    module.pl = types.SimpleNamespace(**vars(pl) | {"pallas_call": pallas_call})
    leave_out_copies(module)


def collapse(target: Chip, rows: int, M: int):
    kernel = peer_module("experimental.deepseek_v4.mhc.pre_kernel").mhc_pre_mixes_collapse
    elements = (2 + STREAMS) * STREAMS
    weights = array(jnp.float32, elements, STREAMS * M), array(jnp.float32, 3), array(jnp.float32, elements)
    run = lambda *args: kernel(*args, rms_eps=1e-6, hc_pre_eps=1e-6)
    return run, (array(jnp.bfloat16, rows, STREAMS * M), *weights)


def expand(target: Chip, rows: int, M: int):
    kernel = peer_module("experimental.deepseek_v4.mhc.post_kernel").mhc_post_2d
    streams = array(jnp.bfloat16, rows, M), array(jnp.bfloat16, rows, STREAMS * M)
    weights = array(jnp.float32, rows, STREAMS), array(jnp.float32, rows, STREAMS, STREAMS)
    return lambda *args: kernel(*args), (*streams, *weights)


def beside(rows: list[dict[str, Any]], name: str, timeout: float) -> list[dict[str, Any]]:
    """The rows of a TPU, with what the peer's kernels should take where it has some; `peer_error` says why not."""
    parts = [(row, *part) for row in rows if row["op"] in DIFFERS for part in profiled(row)]
    cases = [
        Case(f"benchmarks.peer_tpu:{row['op']}", sizes, kernels_alone=True, kernel=kernel)
        for row, _, sizes, tries in parts
        for kernel in tries
    ]
    reports = iter(run_cases(cases, name, profile=("cycles",), timeout=timeout * len(cases)) if cases else [])
    measured: dict[int, list[Any]] = {}
    for row, weight, _, tries in parts:
        measured.setdefault(id(row), []).append((weight, list(itertools.islice(reports, len(tries)))))
    return [row | (found(row, measured[id(row)], chip(name)) if id(row) in measured else {}) for row in rows]


def profiled(row: dict[str, Any]) -> list[tuple[int, dict[str, int], tuple[int | None, ...]]]:
    """How often each part of a row counts, its sizes, and its kernels to profile: one by number, or None for all."""
    sizes, blocks = row["sizes"], row["sizes"].get("blocks", 1)
    if row["op"] == "sparse_mla":  # the profiler may stop after the first of two kernels, or refuse one by itself
        return [(1, sizes, (None, 0, 1))]
    if row["op"] == "fp8_matmuls":
        return [(1, sizes, (0,)), (1, sizes, (1,))]
    if blocks > 1:  # the profile of many takes minutes; all but the first take what the second takes
        return [(blocks - 1, sizes | {"blocks": 2}, (None,)), (2 - blocks, sizes | {"blocks": 1}, (None,))]
    return [(1, sizes, (None,))]


def found(row: dict[str, Any], parts: list[tuple[int, list[dict[str, Any]]]], target: Chip) -> dict[str, Any]:
    """The peer's fields of a row, from the reports on its parts and how often each part counts."""
    differs, total = {"peer_differs": DIFFERS[row["op"]]}, 0
    for weight, reports in parts:
        cycles = {
            op: facts["static_cycles"]
            for report in reports
            for op, facts in report.get("kernels", {}).items()
            if "static_cycles" in facts and not op.startswith("copy")  # XLA's, which bring operands there
        }
        if len(cycles) < (2 if row["op"] == "sparse_mla" else 1):
            why = [reason for report in reports for reason in (report.get("error"), *report.get("notes", [])) if reason]
            return differs | {"peer_error": " ".join(" ".join(["no cycles of its kernel;", *why]).split())[:300]}
        total += weight * sum(cycles.values())
    static = total / target.clock_hz * 1e6
    took = max(static, row["hbm_us"])
    ratio = {"peer_ratio": took / row["estimate_us"]} if "estimate_us" in row else {}
    return differs | {"peer_static_us": static, "peer_us": took} | ratio
