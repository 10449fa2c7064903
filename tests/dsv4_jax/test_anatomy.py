"""Looking at a model changes nothing, and what is seen is what the layers did."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import anatomy, precision
from dsv4_jax.config import CSA, HCA, SLIDING
from dsv4_jax.streams import sinkhorn

pytestmark = pytest.mark.slow

LENGTH = 300


@pytest.fixture(scope="module")
def views(small):
    return anatomy.observe(small, np.random.default_rng(0).integers(2, 190, LENGTH))


def test_streams_are_the_models_own(small, views):
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 190, LENGTH), jnp.int32)[None]
    streams, _ = small(tokens, small.init_cache(1, LENGTH), jnp.full((1,), LENGTH))
    np.testing.assert_allclose(views[-1].streams, np.asarray(streams[0]), rtol=1e-5, atol=1e-5)


def test_each_kind_reads_its_rows(small, views):
    position, size = np.arange(LENGTH), small.config.sliding_window
    near = (position <= position[:, None]) & (position > position[:, None] - size)
    for view in views:
        np.testing.assert_array_equal(view.window, near)
        if view.spec.kind == SLIDING:
            assert view.entries is None
            continue
        complete = (position + 1) // view.spec.ratio
        visible = np.arange(len(view.entries)) < complete[:, None]
        most = small.config.index_topk if view.spec.kind == CSA else LENGTH
        assert not (view.picked & ~visible).any()
        np.testing.assert_array_equal(view.picked.sum(1), np.minimum(complete, most))
        assert (view.spans()[:, 1] + 1 == (np.arange(len(view.entries)) + 1) * view.spec.ratio).all()
    assert {view.spec.kind for view in views} == {SLIDING, CSA, HCA}
    assert any(len(view.entries) > small.config.index_topk for view in views if view.spec.kind == CSA)


def test_recall_lies_between_nothing_and_the_best(small, views):
    csa = next(view for view in views if view.spec.kind == CSA)
    found, best = anatomy.recall(csa)[8:], anatomy.best_recall(csa)[8:]
    assert (found > 0).all() and (found <= best + 1e-6).all() and (best <= 1 + 1e-6).all()
    few = csa.picked.sum(1)[8:] == csa.mass[8:].astype(bool).sum(1)
    np.testing.assert_allclose(found[few], 1, rtol=1e-6)
    assert (csa.mass.sum(1) <= small.config.num_attention_heads).all()  # window and sink have the rest
    with pytest.raises(ValueError, match="sliding"):
        anatomy.recall(next(view for view in views if view.spec.kind == SLIDING))


def test_routing_is_the_routers(small, views):
    tokens = np.random.default_rng(0).integers(2, 190, LENGTH)
    for view, layer in zip(views, small.layers, strict=True):
        index, weights = layer.mlp.gate(jnp.asarray(view.hidden), jnp.asarray(tokens))
        np.testing.assert_array_equal(view.experts, index)
        np.testing.assert_allclose(view.weights, weights, rtol=1e-5)
        loads = anatomy.expert_loads(view, small.config.n_routed_experts)
        assert loads.sum() == pytest.approx(1) and loads.max() < 1


def test_mixing_is_nearly_doubly_stochastic(small, views):
    hc = small.layers[0].attn_hc
    comb = views[0].attn_hc.comb
    logits = views[0].attn_hc.mix[:, 2 * hc.n :] * hc.scale[...][2] + hc.base[...][2 * hc.n :]
    again = sinkhorn(logits.reshape(comb.shape), hc.iterations, hc.eps)
    np.testing.assert_allclose(comb, again, rtol=1e-5)
    residuals = anatomy.sinkhorn_residuals(hc, views[0].attn_hc, hc.iterations)
    assert residuals[-1] == pytest.approx(np.abs(comb.sum(-1) - 1).max(), abs=1e-6)
    assert residuals[-1] < residuals[0]


def test_observe_refuses_what_it_cannot_run(small):
    with pytest.raises(ValueError, match="one row"):
        anatomy.observe(small, np.zeros((2, 4), int))


def test_errors_of_formats_are_ordered():
    x = np.random.default_rng(0).standard_normal((256, 256))
    errors = precision.format_errors(x)
    assert errors["bfloat16"] < errors["e4m3, 1 x 128"] < errors["e2m1, 1 x 32"]
    assert 0.02 < errors["e4m3, 128 x 128"] < 0.04 and 0.08 < errors["e2m1, 1 x 32"] < 0.14
    x[:, 7] *= 200  # one loud channel: its scale drowns its neighbours, unless it is spread over all of them
    still = np.delete(np.arange(256), 7)
    only = {name: precision.relative_error(np.asarray(f(jnp.asarray(x)))[:, still], x[:, still])
            for name, f in precision.FORMATS.items()}  # fmt: skip
    assert only["e2m1, 1 x 32"] > 2 * errors["e2m1, 1 x 32"]


def test_logit_error_ignores_a_constant_and_sees_the_rest():
    want = np.random.default_rng(0).standard_normal((5, 7))
    same = precision.logit_error(want + 3, want)
    assert same.kl == pytest.approx(0, abs=1e-12) and same.relative < 1e-12 and same.same_winner == 1
    other = precision.logit_error(-want, want)
    assert other.kl > 0.1 and other.relative == pytest.approx(2) and other.same_winner == 0
    with pytest.raises(ValueError, match="differ"):
        precision.relative_error(want, want[1:])


def test_each_rounding_point_alone_costs_something(small):
    tokens = np.random.default_rng(1).integers(2, 190, 64)
    exact = anatomy.observe(small, tokens)
    costs = {}
    for numerics in (precision.OnlyKv(), precision.OnlyActivations()):
        rounded = precision.with_numerics(small, numerics)
        costs[numerics.name] = precision.layer_errors(anatomy.observe(rounded, tokens), exact)
        assert small.layers[0].self_attn.numerics.name == "exact"
    for errors in costs.values():
        assert (errors > 1e-5).all() and (errors < 0.2).all()
    assert (costs["KV rows"] != costs["activations"]).all()
