"""Layers in a loop: which run is found, the results of layers written out, and code that does not grow with layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import DeepseekV4, ModelConfig
from dsv4_jax.generate.decode import Shapes, prefill
from dsv4_jax.kernels import TpuKernels, XlaKernels
from dsv4_jax.presets import PRESETS
from dsv4_jax.random_weights import random_weights
from dsv4_jax.repeat import NO_RUN, Run, choose, longest_run, put
from pallas_kernels.chips import chip


@pytest.mark.parametrize(
    "kinds, run",
    [
        ("", NO_RUN),
        ("abcabcabc", NO_RUN),  # three turns are too few
        ("aaaa", Run(0, 1, 4)),
        ("xabababab", Run(1, 2, 4)),
        ("xxabababababy", Run(2, 2, 5)),
        ("aaaabcbcbcbcbc", Run(4, 2, 5)),
        ("babcabcabcabc", Run(1, 3, 4)),
    ],
)
def test_longest_run(kinds, run):
    assert longest_run(list(kinds)) == run


@pytest.mark.parametrize("name, written_out", [("flash", 5), ("pro", 5)])
def test_most_of_the_published_models_is_one_run(name, written_out):
    layers = ModelConfig.from_dict(PRESETS[name]).layers
    run = longest_run(layers)
    assert len(layers) - (run.turns - 1) * run.period == written_out


def test_choose_and_put():
    trees = [{"a": jnp.full((3,), i), "b": jnp.full((2, 2), -i)} for i in range(5)]
    for i in range(5):
        chosen = jax.jit(choose)(i, trees)
        assert chosen["a"].tolist() == [i] * 3 and chosen["b"].tolist() == [[-i] * 2] * 2
        after = jax.jit(put)(i, trees, {"a": jnp.full((3,), 9), "b": jnp.zeros((2, 2), int)})
        assert [int(tree["a"][0]) for tree in after] == [9 if j == i else j for j in range(5)]


def deep(turns: int, kernels, **options) -> DeepseekV4:
    """One sliding layer, then `turns` times HCA and CSA."""
    fields = PRESETS["tiny"] | {
        "num_hidden_layers": 1 + 2 * turns, "compress_ratios": [0, *[128, 4] * turns, 0], "vocab_size": 64,
        "hidden_size": 128, "head_dim": 64, "qk_rope_head_dim": 32, "q_lora_rank": 32, "sliding_window": 16,
        "index_topk": 8, "num_hash_layers": 1, "quantization_config": None, "expert_dtype": None,
    }  # fmt: skip
    return DeepseekV4(ModelConfig.from_dict(fields), max_tokens=256, kernels=kernels, **options)


@pytest.mark.slow
def test_a_loop_gives_what_written_out_layers_give(monkeypatch):
    """Two chunks, rows of unequal length: streams, logits, and the whole cache."""
    model = random_weights(lambda: deep(4, XlaKernels(), dtype=jnp.float32), seed=1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 64)), jnp.int32)
    shapes, lengths = Shapes.of(64, 4, 256, chunk=32), jnp.array([61, 20], jnp.int32)
    results = []
    for in_loop in (False, True):
        monkeypatch.setattr(XlaKernels, "loops_over_layers", in_loop)
        run = jax.jit(lambda model, tokens, lengths: prefill(model, tokens, lengths, shapes))
        results.append(run(model, tokens, lengths))
    want, got = map(jax.tree.leaves, results)
    assert len(want) == len(got) == 48
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.slow
def test_a_tpus_prefill_does_not_grow_with_layers_and_its_decode_has_no_loop():
    def calls(turns: int, tokens: int) -> int:
        model = jax.eval_shape(lambda: deep(turns, TpuKernels(chip("v6e"))))
        piece, count = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        cache = jax.eval_shape(lambda: model.init_cache(1))
        step = lambda model, *args: model(*args, in_loop=tokens > 1 and model.kernels.loops_over_layers)
        return str(jax.make_jaxpr(step)(model, piece, cache, count)).count("name=run_layer")

    assert calls(4, 256) == calls(6, 256) == 3
    assert (calls(4, 1), calls(6, 1)) == (9, 13)
