"""The strategy for one CPU: chosen by name, used by the step, and right."""

from __future__ import annotations

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN, assert_logits_close, checkpoints_with, expected, load_model

import dsv4_jax
from dsv4_jax import DeepseekV4, ModelConfig
from dsv4_jax.kernels import SMALL_BYTES, XlaKernels, resolve_kernels
from dsv4_jax.kernels_cpu import CpuKernels
from dsv4_jax.numerics import NUMERICS
from dsv4_jax.presets import PRESETS
from dsv4_jax.quantized import QuantizedArray, quantize_fp4, quantize_fp8
from dsv4_jax.rope import Rotation
from dsv4_jax.sharding import Parallel
from pallas_kernels.cpu_matmul import few, many
from pallas_kernels.cpu_matmul.cpu import FEW_ROWS
from pallas_kernels.hyper_connection import cpu as hyper_connection

CALM = GOLDEN / "calm" / "fp8"
KERNELS, PLAIN = CpuKernels(), XlaKernels()
EXACT = NUMERICS["exact"]


def values(*shape: int, seed: int = 0, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def test_chosen_by_name():
    assert resolve_kernels("cpu") == KERNELS and hash(KERNELS) == hash(CpuKernels())


def test_chosen_where_one_cpu_holds_a_large_model(monkeypatch):
    assert resolve_kernels("auto", weight_bytes=SMALL_BYTES) == PLAIN
    assert resolve_kernels("auto", weight_bytes=SMALL_BYTES + 1) == KERNELS
    assert resolve_kernels("xla", weight_bytes=SMALL_BYTES + 1) == PLAIN
    made = lambda name, **options: jax.eval_shape(
        lambda: DeepseekV4(ModelConfig.from_dict(PRESETS[name]), max_tokens=64, **options)
    )
    assert made("tiny").kernels == PLAIN and made("flash").kernels == KERNELS
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    parallel = Parallel.over(mesh, ModelConfig.from_dict(PRESETS["flash"]))
    assert made("flash", parallel=parallel).kernels == PLAIN
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert made("flash").kernels == PLAIN


def test_large_is_a_matter_of_the_matrices():
    config = ModelConfig.from_dict(PRESETS["flash"])
    model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=64, kernels="xla"))
    whole = lambda x: math.prod(x.shape)
    is_weight = lambda x: isinstance(x, QuantizedArray)
    held = sum(map(whole, jax.tree.leaves((model.layers, model.lm_head), is_leaf=is_weight)))
    assert 0.99 * held < config.matrix_elements < held


def test_refused_over_a_mesh():
    config = ModelConfig.from_dict(PRESETS["tiny"])
    parallel = Parallel.over(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), config)
    with pytest.raises(ValueError, match="kernels='cpu' runs on one device, not over a mesh; choose 'auto' or 'xla'"):
        jax.eval_shape(lambda: DeepseekV4(config, max_tokens=64, kernels="cpu", parallel=parallel))


def test_refused_where_it_cannot_run(monkeypatch):
    gpu = type("Device", (), {"platform": "gpu", "device_kind": "H100"})
    with pytest.raises(ValueError, match="kernels='cpu' cannot run on 'H100'; choose 'auto' or 'xla'"):
        resolve_kernels("cpu", gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"kernels='cpu' needs Numba: pip install numba"):
        CpuKernels()


@checkpoints_with("greedy", few=("calm/fp8", "tiny/fp8"))
def test_golden_tokens(path):
    """Prefill in few rows and in many, then steps of every kind of layer."""
    model = load_model(path, kernels="cpu")
    greedy = expected(path, "greedy")
    out = dsv4_jax.generate(model, greedy["prompt_ids"], max_new_tokens=8)
    np.testing.assert_array_equal(out.tokens, greedy["tokens"][:, :8])


def test_golden_logits_in_few_rows():
    model = load_model(CALM, kernels="cpu", max_tokens=128)
    want = expected(CALM, "forward")
    assert_logits_close(dsv4_jax.logits(model, want["input_ids"][:1, :FEW_ROWS]), want["logits"][:1, :FEW_ROWS])


@pytest.mark.parametrize("drafts", [2])
def test_drafts_change_nothing(drafts):
    model = load_model(CALM, kernels="cpu", max_tokens=256)
    greedy = expected(CALM, "greedy")
    out = dsv4_jax.generate(model, greedy["prompt_ids"], max_new_tokens=12, drafts=drafts)
    np.testing.assert_array_equal(out.tokens, greedy["tokens"][:, :12])


@pytest.mark.parametrize("rows, target", [(1, few.TARGET), (FEW_ROWS, few.TARGET), (FEW_ROWS + 1, many.TARGET)])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8", "fp4"])
def test_products(form, rows, target):
    """Of few rows and of more by a kernel for each; as XLA's."""
    wide = values(96, 64, seed=1)
    w = {"fp8": quantize_fp8(wide, (128, 128)), "fp4": quantize_fp4(wide)}.get(form)
    w = wide.astype(form) if w is None else w
    x = values(1, rows, 64, dtype="bfloat16" if form == "bfloat16" else "float32")
    project = jax.jit(lambda x, w: KERNELS.project(x, w))
    assert f"@{target}(" in project.lower(x, w).as_text()
    got, want = project(x, w).astype(jnp.float32), PLAIN.project(x, w).astype(jnp.float32)
    np.testing.assert_allclose(got, want, rtol=1e-2 if form == "bfloat16" else 1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 8, 70])
@pytest.mark.parametrize("form", ["float32", "fp4"])
def test_experts(form, tokens):
    hold = quantize_fp4 if form == "fp4" else lambda w: w
    gate_up, down = hold(values(6, 2, 32, 64, seed=2)), hold(values(6, 64, 32, seed=3))
    index = jnp.asarray(np.random.default_rng(4).permuted(np.tile(np.arange(6), (tokens, 1)), axis=1)[:, :3], jnp.int32)
    args = values(tokens, 64), index, jnp.abs(values(tokens, 3, seed=5)), gate_up, down, 10.0, EXACT
    got = jax.jit(lambda *a: KERNELS.expert_mlp(*a, *args[5:]))(*args[:5])
    np.testing.assert_allclose(got, PLAIN.expert_mlp(*args), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 4, 21])
def test_output_projection(tokens):
    o, angle = values(1, tokens, 4, 32), values(1, tokens, 4, seed=6)
    o_a, o_b = values(2 * 16, 64, seed=7), values(48, 32, seed=8)
    args = o, Rotation(jnp.cos(angle), jnp.sin(angle)), o_a, o_b, 2, EXACT
    got, want = KERNELS.output_projection(*args), PLAIN.output_projection(*args)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streams(dtype):
    """By kernels in float32, by XLA in bfloat16."""
    streams, fn, norm = values(1, 5, 2, 64, dtype=dtype), values(8, 128, seed=1), 1 + values(64, seed=2)
    args = fn, values(8, seed=3), values(3, seed=4), norm
    sizes = {"iterations": 20, "eps": 1e-6, "rms_eps": 1e-6}

    def loss(kernels):
        def run(streams, *args):
            x, mixing = kernels.collapse_streams(streams, *args, **sizes)
            return (kernels.expand_streams(2 * x, streams, mixing).astype(jnp.float32) ** 2).mean()

        return jax.value_and_grad(run, argnums=range(5))(streams, *args)

    for got, want in zip(*(jax.tree.leaves(loss(k)) for k in (KERNELS, PLAIN)), strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_plain_products():
    x, w = values(2, 64), values(32, 64, seed=9)
    loss = lambda kernels: lambda x, w: (kernels.project(x, w) ** 2).sum()
    for got, want in zip(*(jax.grad(loss(k), (0, 1))(x, w) for k in (KERNELS, PLAIN)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [1, FEW_ROWS + 1])
def test_the_step_calls_the_kernel(T):
    """Every product with a weight but the router's and the last collapse's."""
    fields = PRESETS["flash"] | {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1}
    config = ModelConfig.from_dict(fields)
    model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=16384, kernels="cpu", dtype="float32"))
    cache = jax.eval_shape(lambda: model.init_cache(1))
    tokens, count = jax.ShapeDtypeStruct((1, T), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    step = lambda model, tokens, cache, count: model.head(model(tokens, cache, count)[0])
    program = str(jax.make_jaxpr(step)(model, tokens, cache, count))
    found = len(re.findall(rf"target_name=({few.TARGET}|{many.TARGET})", program))
    layer = 4 + 2 + 2 + 2  # q_a with kv, q_b, o_a, o_b; two collapses; routed and shared experts
    assert found == 3 * layer + 4 + 1 + 1  # CSA's compressors and indexer, HCA's compressor, the head
    assert [program.count(f"target_name={target}\n") for target in hyper_connection.TARGETS] == [6, 6]
