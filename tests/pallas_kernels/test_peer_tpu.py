"""The public TPU inference package's kernels beside ours: `python -m benchmarks kernels --peer`."""

from __future__ import annotations

import argparse
import importlib.util
import sys

import pytest

from benchmarks import kernels, peer_tpu
from pallas_kernels.aot import available
from pallas_kernels.chips import chip

ROW = {"op": "expert_matmul", "sizes": {"rows": 4, "blocks": 32}, "hbm_us": 1.0, "estimate_us": 50.0}


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "tpu_inference", raising=False)
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    with pytest.raises(RuntimeError, match="pip install --no-deps --target .* tpu-inference=="):
        kernels.run(parser.parse_args(["--peer"]))


def test_two_blocks_tell_what_many_take():
    copies = {"copy.1": {"static_cycles": 10**9}}
    reports = {n: {"kernels": {"gmm.1": {"static_cycles": 1000 + 3000 * n}} | copies} for n in (1, 2)}
    parts = [(weight, [reports[sizes["blocks"]]]) for weight, sizes, _ in peer_tpu.profiled(ROW)]
    row = peer_tpu.found(ROW, parts, chip("v6e"))
    assert row["peer_us"] == pytest.approx((1000 + 3000 * 32) / 1750)
    assert row["peer_ratio"] == pytest.approx(row["peer_us"] / 50)


def test_a_row_says_why_the_peer_has_no_time():
    copies = {"kernels": {"copy.2": {"static_cycles": 7}}, "notes": ["stopped\nearly"]}
    for report, why in ((copies, "stopped early"), ({"error": "MosaicError: no fp4"}, "MosaicError: no fp4")):
        row = peer_tpu.found(ROW, [(1, [report])], chip("v6e"))
        assert row["peer_error"].endswith(why) and "peer_us" not in row


def test_both_kernels_of_attention_count_once():
    row = {"op": "sparse_mla", "sizes": {"B": 4}, "hbm_us": 1.0}
    window, entries = {"SWA.1": {"static_cycles": 1750}}, {"MLA.1": {"static_cycles": 3500}}
    reports = [{"kernels": window}, {"kernels": window}, {"kernels": entries}]
    assert peer_tpu.found(row, [(1, reports)], chip("v6e"))["peer_us"] == pytest.approx(3)
    assert "peer_error" in peer_tpu.found(row, [(1, reports[:2])], chip("v6e"))


@pytest.mark.aot
@pytest.mark.skipif(not available("tpu"), reason="libtpu is not installed: pip install 'dsv4-jax[aot]'")
@pytest.mark.skipif(
    importlib.util.find_spec("tpu_inference") is None, reason=f"tpu-inference is not installed: {peer_tpu.COMMANDS[0]}"
)
def test_a_peer_kernel_compiles():
    row = {"op": "fp8_matmul", "sizes": {"rows": 1, "N": 512, "K": 4096}, "hbm_us": 1.0, "estimate_us": 2.0}
    (beside,) = peer_tpu.beside([row], "v6e", 120)
    assert beside["peer_us"] > 1
