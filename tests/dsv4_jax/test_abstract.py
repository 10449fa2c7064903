"""Constants, abstract models and compiled programs: what is built, when, and what a step carries."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_cases import GOLDEN

import checkpoints
from checkpoints.names import model_leaves
from checkpoints.synth import with_layers
from dsv4_jax import DeepseekV4, ModelConfig, rope
from dsv4_jax.generate.decode import DecodeState, decode_step
from dsv4_jax.generate.sampling import Greedy, row_keys
from dsv4_jax.layer import DecoderLayer
from dsv4_jax.presets import PRESETS


def abstract(name: str, **options) -> DeepseekV4:
    config = ModelConfig.from_dict(PRESETS[name])
    return jax.eval_shape(lambda: DeepseekV4(config, **({"max_tokens": 4096} | options)))


def decode_inputs(model: DeepseekV4, batch: int = 1):
    state = jax.eval_shape(
        lambda: DecodeState(*(jnp.zeros(batch, t) for t in (jnp.int32, bool, jnp.int32)), model.init_cache(batch))
    )
    keys = jax.eval_shape(lambda: row_keys(jnp.uint32(0), batch))
    return state, Greedy(), keys, jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)


def test_loading_builds_each_rope_table_once(monkeypatch):
    built = []

    def counting(spec, max_tokens, original=rope.build_table):
        table = original(spec, max_tokens)
        if not isinstance(table.cos, jax.core.Tracer):
            raise AssertionError("a table was built outside a compiled call")
        jax.debug.callback(lambda _: built.append(spec.theta), table.cos[0, 0])
        return table

    monkeypatch.setattr(rope, "build_table", counting)
    model = checkpoints.load(GOLDEN / "tiny" / "fp8", max_tokens=64)
    jax.effects_barrier()
    assert sorted(built) == [10000.0, 160000.0]
    for table in (model.rope_main, model.rope_compress):
        table.fill()  # filled already: nothing happens
    jax.effects_barrier()
    assert len(built) == 2
    constants = jax.tree.leaves(nnx.state(model, rope.Constant))
    assert len(constants) == 4 and all(c.shape == (64, 32) and c.dtype == jnp.float32 for c in constants)


def test_an_eager_model_builds_its_tables_once(monkeypatch):
    calls = []
    original = rope.build_table
    monkeypatch.setattr(rope, "build_table", lambda spec, n: calls.append(spec) or original(spec, n))
    DeepseekV4(ModelConfig.from_dict(PRESETS["tiny"]), max_tokens=32, dtype=jnp.float32)
    assert len(calls) == 2


def test_constants_stay_abstract_and_out_of_checkpoints():
    gc.collect()
    before = len(jax.live_arrays())
    model = abstract("pro", max_tokens=1 << 20)
    assert len(jax.live_arrays()) == before
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None for leaf in jax.tree.leaves(model))
    assert model.rope_main.cos.get_value().shape == (1 << 20, 32)
    assert not any("rope" in path for path in model_leaves(model))


def test_full_pro_builds_abstractly_in_seconds_and_little_memory():
    program = r"""
        import re, time, jax
        from dsv4_jax import DeepseekV4, ModelConfig
        from dsv4_jax.presets import PRESETS
        began = time.perf_counter()
        config = ModelConfig.from_dict(PRESETS["pro"])
        model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=1 << 20))
        peak = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
        print(time.perf_counter() - began, peak / 2**20)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, timeout=120
    )
    seconds, gibibytes = map(float, out.stdout.split())
    assert seconds < 5 and gibibytes < 1


def largest_literal(text: str) -> int:
    """Bytes (as printed, an upper bound) of the longest dense constant in a module."""
    return max((len(match) for match in re.findall(r"dense<([^>]*)>", text)), default=0)


@pytest.mark.parametrize("name", ["tiny", "flash"])
def test_no_table_or_weight_is_a_literal_of_the_decode_step(name):
    model = abstract(name, max_tokens=65536)
    lowered = jax.jit(decode_step).lower(model, *decode_inputs(model)).as_text()
    assert largest_literal(lowered) < 1 << 20
    arguments = lowered[lowered.index("@main(") : lowered.index("->")]
    assert arguments.count("tensor<65536x32xf32>") == 4  # cos and sin of two tables come in as arguments


def test_one_trace_per_kind_of_layer():
    """Flash has 43 layers of 5 kinds (hash or not, by attention); the program holds each once."""
    model = abstract("flash")
    lowered = jax.jit(decode_step).lower(model, *decode_inputs(model)).as_text()
    kinds = {(spec.kind, spec.hashed) for spec in model.config.layers}
    assert len(set(re.findall(r"func\.func private @(run_layer\w*)", lowered))) == len(kinds)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_cache_is_donated(tiny, steps):
    from dsv4_jax.generate import api, prepare

    state, sampler, keys, stop, limit = decode_inputs(tiny)
    keys = jax.eval_shape(jax.random.key_data, keys)
    inputs = (*prepare.split(tiny), limit, sampler, keys, stop, np.int32(1), state)
    lowered = api._steps.lower(*inputs, steps=steps, drafter=None, alone=False)
    alias = lowered.compile().memory_analysis().alias_size_in_bytes
    cache_bytes = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    assert alias >= 0.99 * cache_bytes


def lowered_decode_step(layers: int) -> tuple[str, int]:
    """StableHLO of a decode step of Flash with so many layers, and how many layers were traced for it."""
    config = ModelConfig.from_dict(with_layers(PRESETS["flash"], layers))
    model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=16384, kernels="xla"))
    traced = []
    with pytest.MonkeyPatch.context() as patch:
        call = DecoderLayer.__call__
        patch.setattr(DecoderLayer, "__call__", lambda self, *args: traced.append(self) or call(self, *args))
        jax.clear_caches()
        lowered = jax.jit(decode_step, static_argnums=2).lower(model, *decode_inputs(model))
    return lowered.as_text(), len(traced)


@pytest.mark.slow
def test_a_step_of_43_layers_is_hardly_more_program_than_one_of_8():
    """Each kind of layer is traced once: sliding, CSA and HCA, routed by hash or by scores."""
    (small, few), (large, many) = lowered_decode_step(8), lowered_decode_step(43)
    assert few == many <= 5
    assert len(large) < 1.2 * len(small)
