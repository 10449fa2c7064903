"""The trainer on a model small enough for a test."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoints
import dsv4_jax
from checkpoints.save import save
from dsv4_jax.numerics import OfficialNumerics
from dsv4_jax.presets import PRESETS
from dsv4_jax.sharding import leaf_path
from pallas_kernels.round_rows import round_rows
from training import dense
from training.ngram import KneserNey

pytest.importorskip("optax", reason="needs the extra `train`")
from training import demo, optimizer  # noqa: E402

CONFIG = PRESETS["tiny"] | {
    "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0],
    "num_attention_heads": 2, "head_dim": 96, "qk_rope_head_dim": 32, "q_lora_rank": 32, "o_lora_rank": 32,
    "sliding_window": 32, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "n_routed_experts": 4,
    "moe_intermediate_size": 32, "num_hash_layers": 1, "hc_mult": 2, "hc_sinkhorn_iters": 3,
}  # fmt: skip
PHASE = demo.Phase("all", 60, 2, 128, (3e-3, 3e-3), "select", drafts=True, rounding=True)


@pytest.fixture(scope="module")
def trained():
    """Parameters after 8 rounded steps on rows that count upwards, and the parts of the loss at each step."""
    model = demo.initialise(CONFIG, 0)
    _, params, _ = nnx.split(model, nnx.Param, ...)
    graph, rest = demo.structure(CONFIG, PHASE, 0)
    labels = jax.tree_util.tree_map_with_path(lambda keys, w: optimizer.label(leaf_path(keys), w), params)
    transformation = optimizer.make(lambda _: 3e-3, labels)
    state, step = transformation.init(params), demo.make_step(CONFIG, PHASE, transformation, graph, rest)
    data, parts = demo.batches(np.arange(4000) % 31, 2, 128, seed=0), []
    for _ in range(8):
        params, state, found = step(params, state, next(data))
        parts.append({name: float(x) for name, x in found.items()})
    return params, rest, parts


@pytest.mark.slow
def test_steps_lower_every_loss(trained):
    _, _, parts = trained
    for name in ("loss", "draft_loss", "index_loss"):
        assert parts[-1][name] < 0.95 * parts[0][name], (name, parts)


@pytest.mark.slow
def test_a_saved_checkpoint_gives_what_was_trained(trained, tmp_path):
    params, rest, _ = trained
    arrays = demo.stored_arrays(CONFIG, params, rest)
    model = checkpoints.load(save(arrays, CONFIG, tmp_path / "out"), dtype=jnp.float32)
    tokens = jnp.asarray(next(demo.batches(np.arange(4000) % 31, 2, 128, seed=1)))[:, :128]
    graph, *_ = nnx.split(demo.build(CONFIG, 128, demo.StraightThrough()), nnx.Param, ...)
    forms = demo.formats(json.dumps(CONFIG))
    wide = nnx.merge(graph, demo.round_weights(jax.tree.map(_as_bf16_where_stored_so, params), forms), rest)
    want = jax.jit(lambda m, t: dense.logits(m.hc_head, m.norm, m.lm_head, dense.forward(m, t)[0]))(wide, tokens)
    got = dsv4_jax.logits(model, np.asarray(tokens))
    # A rounding decision may tip with the order of a sum, so single logits may differ, but not the distribution.
    p, q = jax.nn.log_softmax(want), jax.nn.log_softmax(got)
    assert float((jnp.exp(p) * (p - q)).sum(-1).mean()) < 1e-3


def _as_bf16_where_stored_so(w):
    return w.astype(jnp.bfloat16).astype(w.dtype)


@pytest.mark.slow
def test_training_rounds_as_the_released_formats_do():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 256)), jnp.float32)
    mine, official = demo.StraightThrough(), OfficialNumerics()
    np.testing.assert_array_equal(mine.activations(x, None), round_rows(x, 128))
    np.testing.assert_array_equal(mine.kv(x[..., :128], 64), official.kv(x[..., :128], 64))
    same = jnp.isclose(jax.jit(mine.index)(x[..., :64]), jax.jit(official.index)(x[..., :64]), rtol=1e-5)
    assert same.mean() > 0.99  # a sum in another order may tip a rounding
    gradient = jax.grad(lambda x: mine.activations(x, None).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.ones_like(x))


def test_the_five_gram_model_is_a_distribution_that_knows_its_text():
    text = list(np.random.default_rng(0).integers(0, 5, 300)) + [0, 1, 2, 3, 4] * 20
    gram = KneserNey([text], vocab=7)
    for context in ((), (0,), (0, 1, 2, 3), (6, 6, 6, 6)):
        assert sum(gram.probability(context, token) for token in range(7)) == pytest.approx(1)
    assert gram.probability((0, 1, 2, 3), 4) > 0.8
    assert gram.loss(text).shape == (400,)
