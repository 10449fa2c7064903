"""Flash's decode step, compiled for TPUs that are not there: weights stay packed in it, and are read once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import aot

LAYERS, BATCH, CONTEXT = 4, 8, 16384  # two sliding layers, a CSA and an HCA one
MOST_TEMPORARIES, MOST_READ = 0.02, 1.15  # of the weights; of the weights and cache rows that a step touches
# By default weights are fetched into vector memory ahead of time, and the cost analysis counts such bytes three times
# over. With all that memory given to kernels nothing is fetched ahead, on v6e, and every byte counts once.
NO_PREFETCH = {"v6e": {"xla_tpu_scoped_vmem_limit_kib": "125000"}, "v7x": {}}


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", ["v6e", "v7x"] if os.environ.get("DSV4_FULL_TESTS") else ["v6e"])
def test_no_weight_is_widened_or_read_twice(name):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run([sys.executable, __file__, name], env=env, capture_output=True, text=True, timeout=800)
    assert child.returncode == 0, child.stderr[-3000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["kernels"] >= 5 * LAYERS and found["weights"] > 18e9
    assert found["temporaries"] <= MOST_TEMPORARIES * found["weights"]
    if NO_PREFETCH[name]:
        assert found["read"] <= MOST_READ * found["touched"]


def measure(name: str) -> dict[str, float]:
    """Bytes of weights, temporaries, of what a step touches and of what it moves by the compiler's cost analysis; and
    the number of kernels."""
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

    compiled = aot.compile_tpu(
        jax.jit(step, donate_argnums=2), [model, tokens, cache, count], name, options=NO_PREFETCH[name]
    )
    nbytes = lambda x: x.size * x.dtype.itemsize
    weights = {jax.tree_util.keystr(keys): nbytes(x) for keys, x in jax.tree_util.tree_leaves_with_path(model)}
    cost = compiled.cost_analysis()
    return {
        "weights": sum(weights.values()),
        "touched": sum(size * touched(path, config) for path, size in weights.items())
        + sum(map(nbytes, jax.tree.leaves(cache))),
        "read": (cost[0] if isinstance(cost, list) else cost)["bytes accessed"],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
    }


def touched(path: str, config) -> float:
    """The share of an array that one step reads: of experts those chosen, all of them different."""
    if "mtp" in path or any(name in path for name in ("embed_tokens", "tid2eid", "rope")):
        return 0.0  # a few rows
    if "experts" in path and "shared" not in path:
        return min(BATCH * config.num_experts_per_tok / config.n_routed_experts, 1.0)
    return 1.0


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
