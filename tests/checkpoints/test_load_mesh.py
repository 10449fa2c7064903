"""A mesh of several devices: the same tokens with weights on all of them; split, each reads its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from golden_cases import QUICK_XLA
from jax.sharding import PartitionSpec

import checkpoints
from checkpoints.synth import synth, with_layers
from dsv4_jax.presets import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_replicated_on_four_devices():
    program = """
        import jax, jax.numpy as jnp, numpy as np
        import checkpoints, dsv4_jax
        mesh = jax.make_mesh((4,), ("data",))
        options = {"max_tokens": 256, "dtype": jnp.float32, "numerics": "exact"}
        model = checkpoints.load("tests/golden/calm/fp8", mesh=mesh, **options)
        assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(model))
        want = np.load("tests/golden/calm/fp8.greedy.npz")
        out = dsv4_jax.generate(model, want["prompt_ids"], max_new_tokens=16)
        assert (out.tokens == want["tokens"][:, :16]).all()

        whole = lambda path, shape: jax.sharding.PartitionSpec()  # of which the model knows nothing
        own = checkpoints.load("tests/golden/calm/fp8", mesh=mesh, partition=whole, **options)
        out = dsv4_jax.generate(own, want["prompt_ids"], max_new_tokens=16)
        assert (out.tokens == want["tokens"][:, :16]).all()
    """
    flags = f"{QUICK_XLA} --xla_force_host_platform_device_count=4"
    env = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """An official checkpoint with matrices worth splitting, 70 MB, and what `convert` makes of it."""
    fields = PRESETS["tiny"] | {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 16}
    directory = tmp_path_factory.mktemp("pair")
    official = synth(with_layers(fields, 3), directory / "official")
    return checkpoints.convert(official, directory / "converted"), official


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_each_process_reads_what_its_devices_hold(processes, pair):
    """Three mesh shapes over eight devices; bits are compared in the processes (support/read_parts.py)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = [sys.executable, ROOT / "tests" / "support" / "read_parts.py"]
    devices = f"{QUICK_XLA} --xla_force_host_platform_device_count={8 // processes}"
    env = os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            list(map(str, [*script, process, processes, port, *pair])), env=env, text=True, stdout=-1, stderr=-1
        )
        for process in range(processes)
    ]
    stored = checkpoints.inspect(pair[0]).bytes
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert [row["mesh"] for row in rows] == [[8], [2, 4], [4, 2]]
        for row in rows:
            assert 0.3 * stored / processes < row["held"] <= row["read"] <= 1.1 * row["held"], row


def test_partition_needs_a_mesh(pair):
    with pytest.raises(ValueError, match="partition needs a mesh"):
        checkpoints.load(pair[0], partition=lambda path, shape: PartitionSpec())
