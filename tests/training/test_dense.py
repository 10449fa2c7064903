"""The training pass against the model's own: same logits, same gradient, same picks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.config import ModelConfig
from dsv4_jax.model import DeepseekV4
from dsv4_jax.presets import PRESETS
from dsv4_jax.random_weights import random_weights
from training import dense

pytestmark = pytest.mark.slow

CONFIG = PRESETS["tiny"] | {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0],
    "num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 16, "q_lora_rank": 32, "o_lora_rank": 16,
    "sliding_window": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "n_routed_experts": 4,
    "moe_intermediate_size": 16, "num_hash_layers": 1, "hc_mult": 2, "hc_sinkhorn_iters": 3,
    "quantization_config": None, "expert_dtype": None,
}  # fmt: skip
T = 144  # 36 entries, of which the indexer picks 8; one entry of 128


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.from_dict(CONFIG)
    return random_weights(lambda: DeepseekV4(config, max_tokens=T, dtype=jnp.float32, kernels="xla"), seed=1)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, T + 1)), jnp.int32)


def portable(model, tokens):
    """Logits of the main model and of the first draft, by the portable strategy."""
    B, count = tokens.shape[0], jnp.full(tokens.shape[0], T, jnp.int32)
    streams, _ = model(tokens[:, :T], model.init_cache(B, T), count)
    drafted, _ = model.draft(0, streams, tokens[:, 1:], model.init_mtp_cache(B)[0], jnp.zeros(B, jnp.int32), count)
    return model.head(streams), model.draft_head(0, drafted)


def trained(model, tokens):
    streams, _ = dense.forward(model, tokens[:, :T])
    drafted, _ = dense.draft(model, streams, tokens[:, 1:])
    head = lambda owner, streams: dense.logits(owner.hc_head, owner.norm, model.lm_head, streams)
    return head(model, streams), head(model.mtp[0], drafted)


def test_logits_and_gradient_are_the_portable_strategys(model, tokens):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(logits):
        def loss(params):
            found = logits(nnx.merge(graph, params, rest), tokens)
            return sum(jnp.mean(jnp.sin(x)) for x in found), found

        (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return found, jax.tree_util.tree_flatten_with_path(gradient)[0]

    (got, got_gradient), (want, want_gradient) = run(trained), run(portable)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    for (keys, a), (_, b) in zip(got_gradient, want_gradient, strict=True):
        name = jax.tree_util.keystr(keys)
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-8, err_msg=name)


def test_indexer_learns_only_from_its_own_loss(model, tokens):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        _, trace = dense.forward(nnx.merge(graph, params, rest), tokens[:, :T], index="align")
        return sum(trace.index_losses)

    for keys, gradient in jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(loss))(params))[0]:
        assert bool(jnp.any(gradient != 0)) == ("indexer" in jax.tree_util.keystr(keys)), jax.tree_util.keystr(keys)


def test_recall_of_everything_is_one(model, tokens):
    wide = dataclasses.replace(model.config, index_topk=T)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    whole = nnx.merge(nnx.graphdef(DeepseekV4(wide, max_tokens=T, dtype=jnp.float32, kernels="xla")), params, rest)
    run = jax.jit(lambda m: dense.forward(m, tokens[:, :T])[1].recalls[0][:, -1])
    few, all_ = run(model), run(whole)
    assert np.all(few < 0.9), few
    np.testing.assert_allclose(all_, 1.0, atol=1e-5)


def test_rows_that_are_no_multiple_of_the_window_are_refused(model, tokens):
    with pytest.raises(ValueError, match="145 tokens are no multiple of the window 16"):
        dense.forward(model, tokens)
