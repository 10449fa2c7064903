"""The model over meshes of simulated devices: golden tokens and logits, exact dispatch, the deterministic mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_cases import FULL, GOLDEN, QUICK_XLA, case_name, greedy_checkpoints, slow
from jax.sharding import AbstractMesh

from checkpoints.synth import synth, with_layers
from dsv4_jax import ModelConfig
from dsv4_jax.presets import PRESETS
from dsv4_jax.sharding import RULES, Parallel, mesh_sizes, sizes_of

ROOT = Path(__file__).parents[2]
FLASH, PRO = (ModelConfig.from_dict(PRESETS[name]) for name in ("flash", "pro"))
ALL = [
    pytest.param(path, devices, preset, id=f"{case_name(path)}-{devices}-{preset}")
    for path in greedy_checkpoints()
    for devices in (1, 2, 4, 8)
    for preset in ("latency", "throughput")
]
FEW = [slow(GOLDEN / "calm/fp8", 8, "throughput"), slow(GOLDEN / "wide/bf16", 4, "latency")]
CASES = ALL if FULL else FEW


def run(devices: int, *arguments) -> dict:
    """A check of support/sharded.py in a process with so many devices."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = f"{QUICK_XLA} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "tests/support/sharded.py", *map(str, arguments)]
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("path, devices, preset", CASES)
def test_golden_over_a_mesh(path, devices, preset):
    found = run(devices, "golden", path, preset)
    assert devices == found["mesh"]["data"] * found["mesh"]["expert"] * found["mesh"]["model"]


@pytest.mark.slow
def test_a_long_prompt_is_also_split_by_sequence():
    """Each device scores a piece of the tokens; the picks are those of all."""
    found = run(2, "sequence", "wide/bf16")
    assert found["tokens"] > 256 and found["scored"] == [256]  # of a bucket of 512


@pytest.mark.parametrize("experts, tokens, expert, model", [slow(16, 40, 4, 2), (8, 200, 4, 1), slow(8, 40, 1, 4)])
def test_no_token_is_dropped_at_any_imbalance(experts, tokens, expert, model):
    """Up to 64 tokens go in one round; 200 that all want the same shard need two."""
    found = run(expert * model, "dispatch", experts, tokens, expert, model)
    assert (found["room"] < tokens) == (tokens > 64)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [4, 64] if FULL else [4])
def test_deterministic_mode_gives_the_same_bits(batch):
    assert run(4, "same_bits", "calm/fp8", batch)["agrees_with_the_usual_mode"] > 0.9


@pytest.mark.slow
def test_quantised_weights_are_cut_at_their_blocks(tmp_path):
    fields = PRESETS["tiny"] | {"moe_intermediate_size": 256, "n_routed_experts": 8, "o_lora_rank": 128}
    official = synth(with_layers(fields, 3), tmp_path / "official")
    found = run(8, "quantised_over_model", official)
    assert [mesh["model"] for mesh in found["meshes"]] == [2, 1, 2]


@pytest.mark.parametrize(
    "config, devices, preset, sizes",
    [
        (FLASH, 8, "latency", (1, 1, 8)),
        (FLASH, 16, "latency", (1, 2, 8)),
        (FLASH, 64, "throughput", (1, 64, 1)),
        (FLASH, 512, "throughput", (2, 256, 1)),
        (PRO, 16, "latency", (1, 2, 8)),  # 16 would cut a block of the shared expert's 3,072 channels
        (PRO, 256, "throughput", (2, 128, 1)),  # 384 experts
    ],
)
def test_presets(config, devices, preset, sizes):
    assert tuple(mesh_sizes(config, devices, preset).values()) == sizes


@pytest.mark.parametrize(
    "sizes, says",
    [
        ({"expert": 3}, "n_routed_experts=256 cannot be split over expert=3 x model=1"),
        ({"expert": 64, "model": 8}, "n_routed_experts=256 cannot be split over expert=64 x model=8"),
        ({"model": 16}, "o_groups=8 cannot be split over model=16"),
        ({"x": 2}, "mesh axis 'x' is not known; name the axes from data, expert, model"),
    ],
)
def test_axes_that_do_not_fit(sizes, says):
    with pytest.raises(ValueError, match=says):
        Parallel.over(AbstractMesh(tuple(sizes.values()), tuple(sizes)), FLASH)


def test_pieces_of_a_sequence():
    parallel = Parallel(model=4)
    assert [parallel.sequence_piece(n) for n in (2048, 256, 128, 1, 1026)] == [512, 64, 128, 1, 1026]


def test_blocks_are_not_cut():
    with pytest.raises(ValueError, match="moe_intermediate_size=3072 cannot be split over model=16 into whole blocks"):
        Parallel.over(AbstractMesh((16,), ("model",)), PRO)


@pytest.mark.parametrize("text", ["", "fast", "data", "data=0", "data=x", "rows=2"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="write latency or throughput, or sizes such as"):
        sizes_of(text)


def test_every_rule_names_a_parameter():
    import jax

    from dsv4_jax import DeepseekV4
    from dsv4_jax.sharding import leaf_path

    model = jax.eval_shape(lambda: DeepseekV4(FLASH, max_tokens=64, kernels="xla"))
    paths = [leaf_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(model)]
    strip = lambda path: path.removesuffix(".data").removesuffix(".scale")
    for rule in RULES:
        assert any(strip(path) == rule or strip(path).endswith("." + rule) for path in paths), rule
