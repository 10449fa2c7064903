"""A decode step of Flash's shapes, compiled for TPUs that are not there: weights stay packed in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import aot

LAYERS, BATCH, CONTEXT = 4, 8, 16384  # two sliding layers, a CSA and an HCA one
MOST_TEMPORARIES = 0.02  # of the weights


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", ["v6e", "v7x"])
def test_no_weight_is_widened(name):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run([sys.executable, __file__, name], env=env, capture_output=True, text=True, timeout=800)
    assert child.returncode == 0, child.stderr[-3000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["kernels"] >= 5 * LAYERS and found["weights"] > 18e9
    assert found["temporaries"] <= MOST_TEMPORARIES * found["weights"]


def measure(name: str) -> dict[str, int]:
    """Bytes of weights and of temporaries, and the number of kernels."""
    import jax
    import jax.numpy as jnp

    from checkpoints.synth import with_layers
    from dsv4_jax import DeepseekV4, ModelConfig
    from dsv4_jax.kernels import TpuKernels
    from dsv4_jax.presets import PRESETS
    from pallas_kernels.chips import chip

    config = ModelConfig.from_dict(with_layers(PRESETS["flash"], LAYERS))
    kernels = TpuKernels(chip(name))
    model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=CONTEXT, dtype=jnp.bfloat16, kernels=kernels))
    cache = jax.eval_shape(lambda: model.init_cache(BATCH))
    tokens, count = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32), jax.ShapeDtypeStruct((BATCH,), jnp.int32)

    def step(model, tokens, cache, count):
        streams, cache = model(tokens, cache, count)[:2]
        return jnp.argmax(model.head(streams), -1), cache

    compiled = aot.compile_tpu(jax.jit(step, donate_argnums=2), [model, tokens, cache, count], name)
    return {
        "weights": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model)),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
