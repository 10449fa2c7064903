"""The matrix kernels compile to machine code for every TPU generation; needs libtpu, no TPU. One child per chip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pallas_kernels.aot import Case, available, run_cases
from pallas_kernels.chips import TPUS

PROGRAMS = str(Path(__file__).parents[1] / "support" / "aot_child.py")
FLASH, PRO = {"E": 256, "N": 4096, "K": 4096}, {"E": 384, "N": 7168, "K": 3072}  # gate and up of one, down of the other
FLASH_UP, PRO_UP = FLASH | {"stacks": 2}, {"E": 24, "N": 6144, "K": 7168, "stacks": 2}
COPY_NOTHING = "Flash experts, one token", "Pro experts, a token", "Pro experts, gate and up, a batch"
SPARE_BYTES = 4 << 20  # less than their scales
# name: program, its arguments
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Flash q_b, one row": ("fp8_matmul", {"rows": 1, "N": 32768, "K": 1024}),
    "Flash q_a and kv, a batch": ("fp8_matmuls", {"rows": 64, "columns": [1024, 512], "K": 4096}),
    "Pro q_a and kv, a chunk of a prompt": ("fp8_matmuls", {"rows": 2048, "columns": [1536, 512], "K": 7168}),
    "Flash o_b, a chunk of a prompt": ("fp8_matmul", {"rows": 2048, "N": 4096, "K": 8192}),
    "Pro o_b, a batch": ("fp8_matmul", {"rows": 64, "N": 7168, "K": 16384}),
    "Pro q_a, prefill, float32 scales": ("fp8_matmul", {"rows": 512, "N": 1536, "K": 7168, "scale": "float32"}),
    "codes, prefill": ("fp8_matmul", {"rows": 512, "N": 1024, "K": 4096, "x": "float8_e4m3fn", "x_scale": "float32"}),
    "an odd number of columns": ("fp8_matmul", {"rows": 5, "N": 131, "K": 200}),
    "Flash o_a, one row": ("output_projection", {"rows": 1, "H": 64, "groups": 8}),
    "Pro o_a, a batch": ("output_projection", {"rows": 64, "H": 128, "groups": 16}),
    "Flash experts, one token": ("expert_matmul", {"rows": 1, "blocks": 6, **FLASH_UP}),
    "Flash experts, tokens of a batch": ("expert_matmul", {"rows": 2, "blocks": 48, "tokens": 8, **FLASH}),
    "Pro experts, a token": ("expert_matmul", {"rows": 1, "blocks": 6, "tokens": 1, **PRO}),
    "Pro experts, a batch": ("expert_matmul", {"rows": 2, "blocks": 576, **PRO}),
    "Pro experts, gate and up, a batch": ("expert_matmul", {"rows": 2, "blocks": 32, **PRO_UP}),
    "FP8 experts, one token": ("expert_matmul", {"rows": 1, "blocks": 6, **FLASH, "packed": False}),
}
# These take the compiler 10 s each: every one for two generations; `benchmarks kernels` compiles all for all.
FLASH_PREFILL: dict[str, tuple[str, dict[str, Any]]] = {
    "Flash o_a, prefill": ("output_projection", {"rows": 512, "H": 64, "groups": 8}),
    "Flash experts, prefill": ("expert_matmul", {"rows": 128, "blocks": 448, **FLASH}),
}
PRO_PREFILL: dict[str, tuple[str, dict[str, Any]]] = {
    "Pro o_b, prefill": ("fp8_matmul", {"rows": 512, "N": 7168, "K": 16384}),
    "Pro experts, prefill": ("expert_matmul", {"rows": 128, "blocks": 576, **PRO}),
    "FP8 experts, prefill": ("expert_matmul", {"rows": 128, "blocks": 448, **FLASH, "packed": False}),
}


@pytest.mark.aot
@pytest.mark.skipif(not available("tpu"), reason="libtpu is not installed: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles(name):
    cases = CASES | (FLASH_PREFILL if name in ("v5e", "v6e") else PRO_PREFILL)
    reports = run_cases([Case(f"{PROGRAMS}:{program}", sizes) for program, sizes in cases.values()], name)
    failed = {case: report["error"] for case, report in zip(cases, reports, strict=True) if "error" in report}
    assert not failed
    for case, report in zip(cases, reports, strict=True):
        assert report["custom_calls"].get("tpu_custom_call") == 1, case
        if case in COPY_NOTHING:
            assert report["bytes"]["temp"] < SPARE_BYTES, case
