"""A mesh of several devices: weights and tables on all of them, the same tokens."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
    """
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
