"""Strategies: how one is chosen, and that the model runs, and runs right, on its kernels."""

from __future__ import annotations

import collections
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN, assert_logits_close, expected, load_model

import dsv4_jax
from dsv4_jax import DeepseekV4, ModelConfig
from dsv4_jax.kernels import TpuKernels, XlaKernels, resolve_kernels
from dsv4_jax.presets import PRESETS
from pallas_kernels.chips import TPUS, chip

CALM = GOLDEN / "calm" / "fp8"


def device(platform: str, kind: str):
    return types.SimpleNamespace(platform=platform, device_kind=kind)


def test_chosen_by_the_device_or_by_name():
    assert resolve_kernels("auto", device("cpu", "cpu")) == XlaKernels()
    assert resolve_kernels("xla", device("tpu", "TPU7x")) == XlaKernels()
    assert resolve_kernels("auto", device("tpu", "TPU v6 lite")) == TpuKernels(chip("v6e"))
    assert resolve_kernels("tpu", device("tpu", "TPU v5p")).chip.name == "v5p"
    assert hash(resolve_kernels("tpu-interpret")) == hash(TpuKernels(chip("v6e"), interpret=True))


def test_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="kernels='cuda' is not known; choose one of 'auto', 'xla', 'cpu', 'tpu'"):
        resolve_kernels("cuda")
    with pytest.raises(ValueError, match="kernels='tpu' cannot run on 'cpu'; choose 'auto' or 'xla'"):
        resolve_kernels("tpu")
    with pytest.raises(ValueError, match="kernels='gpu' cannot run on 'cpu'; choose 'auto' or 'xla'"):
        resolve_kernels("gpu")
    with pytest.raises(ValueError, match="kernels='tpu': no kernel of this kind for H100; it runs on v5e"):
        TpuKernels(chip("H100"))
    with pytest.raises(ValueError, match="no chip facts for device kind 'TPU v2'"):
        resolve_kernels("auto", device("tpu", "TPU v2"))


@pytest.mark.slow
def test_golden_logits_and_tokens_on_the_tpu_kernels():
    """Every kind of layer, prefill and decode, in the interpreter."""
    model = load_model(CALM, kernels="tpu-interpret", max_tokens=128)
    want = expected(CALM, "forward")
    ids = want["input_ids"][:1, :40]
    assert_logits_close(dsv4_jax.logits(model, ids), want["logits"][:1, :40])
    greedy = expected(CALM, "greedy")
    out = dsv4_jax.generate(model, greedy["prompt_ids"], max_new_tokens=3)
    np.testing.assert_array_equal(out.tokens, greedy["tokens"][:, :3])


@pytest.mark.slow
def test_an_8_bit_cache_on_the_tpu_kernels():
    """Rows are written by a kernel then; the text is the portable strategy's."""
    prompt = expected(CALM, "greedy")["prompt_ids"][:, :20]
    load = lambda kernels: load_model(CALM, kernels=kernels, max_tokens=64, cache_dtype="fp8")
    want, got = (dsv4_jax.generate(load(name), prompt, max_new_tokens=9) for name in ("xla", "tpu-interpret"))
    np.testing.assert_array_equal(got.tokens, want.tokens)


def test_a_step_writes_8_bit_rows_in_place():
    fields = PRESETS["flash"] | {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1}
    config, kernels = ModelConfig.from_dict(fields), TpuKernels(chip("v6e"))
    model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=16384, kernels=kernels, cache_dtype="fp8"))
    cache = jax.eval_shape(lambda: model.init_cache(2))
    tokens, count = jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    program = str(jax.make_jaxpr(lambda model, *args: model(*args))(model, tokens, cache, count))
    calls = collections.Counter(re.findall(r"name=(\w+)", program))
    assert calls["put_rows"] == 3 + 2 + 1  # windows, entries, index keys
    assert calls["store_rows"] == 3 + 2  # windows, entries
    assert calls["encode_index"] == 1 and calls["pool_window"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 512], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", TPUS)
def test_the_step_calls_the_kernel_in_every_kind_of_layer(name, T):
    """Flash's own shapes; a strategy that quietly took the portable path would fail here."""
    fields = PRESETS["flash"] | {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1}
    config = ModelConfig.from_dict(fields)
    model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=16384, kernels=TpuKernels(chip(name))))
    cache = jax.eval_shape(lambda: model.init_cache(2))
    tokens, count = jax.ShapeDtypeStruct((2, T), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    step = lambda model, tokens, cache, count: model(tokens, cache, count)
    program = str(jax.make_jaxpr(step)(model, tokens, cache, count))
    calls = collections.Counter(re.findall(r"name=(\w+)", program))
    form = "decode" if T == 1 else "prefill"
    assert calls["sparse_mla"] == calls["fp8_output_projection"] == 3 and calls[f"index_topk_{form}"] == 1
    assert calls["expert_matmul"] == 2 * 3 and calls["fp8_matmul"] == 3 * (3 + 2) + 1  # q_a with kv; the indexer's
    assert calls["norm_heads"] == 3 and calls["round_rows"] == 3 * (3 + 2) + 1  # in front of all of those but o_a
    assert calls["expert_hidden"] == 2 * 3 and calls["route"] == 2  # one layer looks its experts up by token
    assert calls["arrange_pairs"] == calls["add_rows"] == (3 if T == 1 else 0)
    assert calls["round_index"] == 2  # queries and keys
    assert calls["store_rows"] == 3 + 2  # KV rows, entries
    assert calls["rms_norm"] == 3 + 1  # of the queries' latent, index keys
    assert calls["pool_window"] == (3 if T == 1 else 0)  # HCA, CSA and its indexer
    assert calls["hyper_connection_collapse"] == calls["hyper_connection_expand"] == 2 * 3
