"""The GPU strategy: what it refuses, that the model's steps run on its kernels, and that they are the portable ones."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN
from gpu_interpreter import InterpretGPUParams

import checkpoints
from benchmarks import gpu
from checkpoints.synth import synth
from dsv4_jax import DeepseekV4, ModelConfig
from dsv4_jax.kernels_gpu import GpuKernels
from dsv4_jax.presets import PRESETS
from pallas_kernels.chips import chip

pytestmark = pytest.mark.interpreter


FLASH = PRESETS["flash"] | {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1}


def step_program(T: int, dtype=jnp.bfloat16, **fields) -> str:
    """The jaxpr of a step of 2 x T tokens."""
    config = ModelConfig.from_dict(FLASH | fields)
    build = lambda: DeepseekV4(config, max_tokens=16384, dtype=dtype, kernels=GpuKernels(chip("H200")))
    model = jax.eval_shape(build)
    cache = jax.eval_shape(lambda: model.init_cache(2))
    tokens, count = jax.ShapeDtypeStruct((2, T), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    return str(jax.make_jaxpr(lambda model, *args: model(*args))(model, tokens, cache, count))


@pytest.mark.parametrize("T", [1, 512], ids=["decode", "prefill"])
def test_the_step_calls_the_kernels_in_every_kind_of_layer(T):
    """Flash's own shapes; a strategy that quietly took the portable path would fail here."""
    calls = collections.Counter(re.findall(r"name=(\w+)", step_program(T)))
    assert calls["sparse_mla"] == calls["fp8_output_projection"] == 3
    assert calls["index_topk"] == 1  # of the CSA layer
    assert calls["expert_matmul"] == 2 * 3 and calls["fp8_matmul"] == 3 * (4 + 2) + 1  # and the indexer's queries


# The least model that the kernels take: one layer, FP8 and FP4 weights
SMALL = {
    "num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 1, "num_nextn_predict_layers": 0,
    "hidden_size": 256, "head_dim": 256, "num_attention_heads": 2, "q_lora_rank": 128, "o_lora_rank": 128,
    "o_groups": 2, "moe_intermediate_size": 256, "n_routed_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64,
}  # fmt: skip


def test_a_model_computes_the_same_on_the_kernels(tmp_path):
    """In the interpreter, on one multiprocessor, against the portable path."""
    path = synth(json.loads((GOLDEN / "calm/fp8/config.json").read_text()) | SMALL, tmp_path / "small")
    one_core = dataclasses.replace(chip("H200"), cores=1)
    streams = []
    for kernels in ("xla", GpuKernels(one_core, InterpretGPUParams())):
        model = checkpoints.load(path, max_tokens=64, dtype=jnp.bfloat16, kernels=kernels, numerics="exact")
        step = jax.jit(lambda model, *args: model(*args)[0])
        out = step(model, jnp.asarray([[3]]), model.init_cache(1), jnp.asarray([1]))
        streams.append(np.asarray(out, np.float32))
    want, got = streams
    assert np.abs(got - want).max() <= 2**-6 * np.abs(want).max()


@pytest.mark.parametrize("name", ["A100", "v6e"])
def test_other_chips_are_refused_by_name(name):
    with pytest.raises(
        ValueError, match=f"kernels='gpu': .*{name}; it runs on H100, H200, B200; .*choose kernels='xla'"
    ):
        GpuKernels(chip(name))


def test_models_the_kernels_cannot_take_are_refused():
    with pytest.raises(ValueError, match="cast to bfloat16.*choose kernels='xla'"):
        step_program(1, dtype=jnp.float32)
    with pytest.raises(ValueError, match="64 heads of 128 channels.*choose kernels='xla'"):
        step_program(1, head_dim=128)
    with pytest.raises(ValueError, match="top_k=1032; it takes 64 of 128 and 1024 at most.*choose kernels='xla'"):
        step_program(1, index_topk=1032)


def test_benchmarks_want_a_gpu():
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU .* the first device is 'cpu'"):
        gpu.run(argparse.Namespace(only=""))
