"""The GPU kernels and a decode step of the model, compiled to machine code for GPUs that are not there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels import aot
from pallas_kernels.aot import Case, run_cases

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "support" / "gpu_cases.py"
LAYERS, BATCH, CONTEXT = 4, 8, 8192  # two sliding layers, a CSA and an HCA one
MOST_TEMPORARIES = 0.02  # of the weights

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not aot.available("cuda"), reason="needs the CUDA compiler: pip install 'dsv4-jax[aot]'"),
]

# Flash and Pro: (rows, N, K); (rows, heads, groups); (rows of a block, blocks, experts, N, K, packed)
FP8 = [(1, 512, 4096), (1, 32768, 1024), (16, 1536, 7168), (64, 2048, 4096), (64, 7168, 3072), (2048, 4096, 8192)]
OUTPUT = [(1, 64, 8), (64, 128, 16), (2048, 64, 8)]
EXPERTS = [
    (1, 6, 256, 4096, 4096, True),
    (2, 320, 384, 6144, 7168, True),
    (64, 256, 256, 4096, 2048, True),
    (128, 448, 384, 7168, 3072, True),
    (1, 6, 256, 4096, 4096, False),
    (128, 448, 256, 4096, 2048, False),
]
# (sequences, tokens, heads, listed entries or None, rows in 8 bits)
ATTENTION = [
    *((4, 1, 64, picks, coded) for picks in (512, None) for coded in (False, True)),
    (64, 2, 128, 1024, True),
    (1, 2048, 64, 512, False),
    (1, 2048, 128, None, True),
]
# (sequences, tokens, keys, picks, keys in 4 bits)
INDEX = [
    *(
        (*shape, coded)
        for shape in ((1, 1, 262144, 512), (4, 2, 65536, 1024), (1, 2048, 262144, 512))
        for coded in (0, 1)
    ),
    (1, 1, 262144, 1024, True),
    (64, 8, 16386, 1024, True),
    (1, 2048, 16384, 1024, False),
]


def cases() -> list[Case]:
    named = lambda op, names, rows: [Case(f"{PROGRAMS}:{op}", dict(zip(names, row, strict=True))) for row in rows]
    fp8 = [(*shape, codes) for shape in FP8 for codes in (False, True)]
    return [
        *named("fp8_matmul", ("rows", "N", "K", "codes"), fp8),
        *named("output_projection", ("rows", "H", "groups"), OUTPUT),
        *named("sparse_mla", ("B", "T", "H", "picks", "coded"), ATTENTION),
        *named("index_topk", ("B", "T", "N", "top_k", "coded"), INDEX),
        *named("expert_matmul", ("rows", "blocks", "E", "N", "K", "packed"), EXPERTS),
    ]


@pytest.mark.parametrize("name", ["H100", "B200"])
def test_nothing_spills(name):
    reports = run_cases(cases(), name, timeout=800)
    for report in reports:
        assert "error" not in report, report
        assert report["kernels"], report
        for kernel in report["kernels"].values():
            assert kernel["spill_bytes"] == 0 and kernel["stack_bytes"] == 0, report
        if report["target"].endswith("index_topk"):
            check_index_memory(report["bytes"]["temp"], **report["arguments"])


def check_index_memory(temporaries: int, B: int, T: int, N: int, top_k: int, coded: bool) -> None:
    """Queries in another order, weights in fp32, and lists; no scores: these alone would be 4 B T N."""
    operands, lists = B * T * 64 * (2 * 128 + 4), 2 * B * T * N  # 8 bytes an entry of lists, a quarter of the keys
    assert temporaries <= operands + min(lists, 8 << 20) + (64 << 10)


@pytest.fixture(scope="module", params=["H100", "B200"])
def step(request):
    """A decode step with one draft, compiled for a GPU: its memory, its kernels, and when its regions start."""
    flags = "--xla_gpu_enable_triton_gemm=false"  # its tiles are chosen by timing, which is not to be had
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": search_path(), "XLA_FLAGS": flags}
    child = subprocess.run(
        [sys.executable, __file__, request.param], env=env, capture_output=True, text=True, timeout=800
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_weights_stay_packed_in_a_decode_step(step):
    print({name: step[name] for name in ("weights", "temporaries", "kernels")})
    assert step["temporaries"] <= MOST_TEMPORARIES * step["weights"]
    # A layer has 5 projections, attention, 2 products of the shared expert, 2 of the routed ones; an indexer has one
    # and its choice, the MTP layer two more.
    assert step["kernels"] == 10 * (LAYERS + 1) + 2 + 2


# What runs on the main stream of a fork, by its weight -> kind of layer -> the streams that its branches take
FORKS = {
    "q_a_proj": {"csa": [1, 2, 3], "hca": [1]},
    "q_b_proj": {"sliding": [1], "csa": [1, 2, 3], "hca": [1, 2], "mtp": [1]},
    "shared_experts": {"sliding": [2], "csa": [2], "hca": [2], "mtp": [2]},
    "h_proj": {"mtp": [3]},
}
KINDS = {"layers_0": "sliding", "layers_1": "sliding", "layers_2": "csa", "layers_3": "hca", "mtp_0": "mtp"}


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("fork", FORKS)
def test_lanes_start_before_the_main_work_ends(step, layer, fork):
    regions = [r for r in step["regions"] if r["layer"] == layer and r["fork"] == fork]
    streams = FORKS[fork].get(KINDS[layer], [])
    assert sorted(r["stream"] for r in regions) == ([0, *streams] if streams else [])
    for main in (r for r in regions if r["stream"] == 0):
        for lane in regions:
            assert lane["start"] < main["done"] and main["start"] < lane["done"]


def search_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def regions(program: str) -> list[dict[str, Any]]:
    """The regions on streams of a scheduled program: their layer, fork and stream, and the lines of start and done."""
    found = {}
    for number, line in enumerate(program[program.index("\nENTRY ") :].splitlines()):
        if call := re.match(r" *%?(\S+) = .* call-start\((.*?)\), to_apply", line):
            fork = next(fork for fork in FORKS if f"_{fork}_" in call[2])
            layer = re.search(r"model_((?:layers|mtp)_\d+)_", call[2])[1]
            stream = int(re.search(r'_xla_stream_annotation="(\d+)"', line)[1])
            found[call[1]] = {"layer": layer, "fork": fork, "stream": stream, "start": number}
        elif call := re.search(r" call-done\(%?(\S+?)\)", line):
            found[call[1]]["done"] = number
    return list(found.values())


def measure(name: str) -> dict[str, Any]:
    """Bytes of weights and of temporaries, how many Mosaic kernels the step has, and its `regions`."""
    import jax
    import jax.numpy as jnp

    from checkpoints.synth import with_layers
    from dsv4_jax import DeepseekV4, ModelConfig
    from dsv4_jax.kernels_gpu import GpuKernels
    from dsv4_jax.presets import PRESETS
    from pallas_kernels.chips import chip

    config = ModelConfig.from_dict(with_layers(PRESETS["flash"], LAYERS))
    kernels = GpuKernels(chip(name))
    model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=CONTEXT, dtype=jnp.bfloat16, kernels=kernels))
    cache, memory = jax.eval_shape(lambda: (model.init_cache(BATCH), model.init_mtp_cache(BATCH, drafts=1)[0]))
    tokens, count = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32), jax.ShapeDtypeStruct((BATCH,), jnp.int32)

    def step(model, tokens, cache, memory, count):
        start = cache.length
        streams, cache = model(tokens, cache, count)
        token = jnp.argmax(model.head(streams), -1).astype(jnp.int32)
        streams, memory = model.draft(0, streams, token, memory, start, count)
        return token, jnp.argmax(model.draft_head(0, streams), -1), cache, memory

    jitted = jax.jit(step, donate_argnums=(2, 3))
    compiled = aot.compile_gpu(jitted, [model, tokens, cache, memory, count], name)
    program = compiled.as_text()
    return {
        "weights": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model)),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": program.count('custom_call_target="mosaic_gpu'),
        "regions": regions(program),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
