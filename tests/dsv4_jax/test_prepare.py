"""Preparation: weights laid out anew say the same, are kept while the model lives, and only while it does."""

from __future__ import annotations

import functools
import gc
import importlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax import DeepseekV4, ModelConfig
from dsv4_jax.linear import linear
from dsv4_jax.presets import PRESETS
from dsv4_jax.quantized import QuantizedArray, Stack, Turned, TurnedGroups, dequantize
from dsv4_jax.random_weights import random_weights

prepare = importlib.import_module("dsv4_jax.generate.prepare")
PROMPT = np.random.default_rng(0).integers(3, 192, (1, 19)).astype(np.int32)


def unquantised() -> ModelConfig:
    return ModelConfig.from_dict(PRESETS["tiny"] | {"quantization_config": None, "expert_dtype": None})


@pytest.fixture
def plain(monkeypatch):
    """Run something with nothing prepared."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "SMALL_BYTES", 0)
            return call()

    return run


@pytest.mark.slow
def test_prepared_weights_hold_the_same_values(small):
    keyed = jax.tree_util.tree_flatten_with_path(small, is_leaf=prepare._is_weight)[0]
    structure, leaves = prepare.ready(small)
    is_value = lambda x: isinstance(x, QuantizedArray | Stack | Turned | TurnedGroups)
    prepared = jax.tree.leaves(jax.tree.unflatten(structure.treedef, leaves), is_leaf=is_value)
    turned = 0
    for (keys, old), new in zip(keyed, prepared, strict=True):
        assert old.shape == new.shape, keys
        held = new.data if isinstance(new, QuantizedArray) else new
        turned += isinstance(held, Turned)
        if isinstance(held, Turned):
            held = jnp.moveaxis(held.data, 0, -1)
        elif isinstance(held, TurnedGroups):
            held = held.astype(jnp.float32)
        elif isinstance(held, Stack):
            np.testing.assert_array_equal(held.whole, jnp.stack(held.each))
            held = held.whole
        np.testing.assert_array_equal(held, dequantize(old, jnp.float32) if prepare._is_weight(old) else old)
    assert turned > 20


def test_prepared_models_say_the_same(small, plain):
    say = lambda: dsv4_jax.logits(small, PROMPT)
    np.testing.assert_allclose(say(), plain(say), rtol=0, atol=2e-4)


def test_preparation_is_done_once_and_again_for_other_weights(small):
    structure, leaves = prepare.ready(small)
    again, same = prepare.ready(small)
    assert again is structure and all(a is b for a, b in zip(leaves, same, strict=True))
    other = jax.tree.map(lambda x: x, small)
    other.lm_head.set_value(small.lm_head[...] * 2)
    fresh = jax.tree.unflatten(*(lambda s, x: (s.treedef, x))(*prepare.ready(other)))
    np.testing.assert_array_equal(fresh.lm_head[...].data, 2 * small.lm_head[...].T)


def test_copies_go_when_the_model_does(small):
    model = jax.tree.map(jnp.copy, small)
    prepare.ready(model)
    assert prepare._latest._sources
    del model
    gc.collect()
    assert not prepare._latest._sources and not prepare._latest._leaves


def test_rows_that_go_alone_read_weights_as_they_are_on_a_mesh(small):
    structure, leaves = prepare.ready(small, turn=False)
    held = jax.tree.unflatten(structure.treedef, leaves)
    assert isinstance(held.lm_head[...], jax.Array) and held.layers[0].self_attn.q_a_proj.get_value().scale is None


@pytest.mark.slow
def test_large_models_are_not_copied(plain):
    """Their experts and groups of o_a are taken apart, in place; every other array is the model's own."""
    model = random_weights(lambda: DeepseekV4(unquantised(), max_tokens=64, dtype=jnp.float32), seed=0)
    structure, leaves = plain(lambda: prepare.ready(model))
    own = {id(x) for x in jax.tree.leaves(model)}
    layer = jax.tree.unflatten(structure.treedef, leaves).layers[0]
    experts, o_a = layer.mlp.experts.down_proj.get_value(), layer.self_attn.o_a_proj.get_value()
    for stack, count in ((experts, model.config.n_routed_experts), (o_a, model.config.o_groups)):
        assert isinstance(stack, Stack) and len(stack.each) == count
        first, step = stack.whole.unsafe_buffer_pointer(), stack.whole.nbytes // count
        assert [x.unsafe_buffer_pointer() for x in stack.each] == [first + i * step for i in range(count)]
    assert sum(id(x) in own for x in leaves) == len(own)


@pytest.mark.slow
def test_parts_read_in_place_give_the_same_tokens(plain):
    """One row of one token reads experts and groups of o_a where they lie; a prepared model reads turned copies."""
    model = random_weights(lambda: DeepseekV4(unquantised(), max_tokens=64, dtype=jnp.float32), seed=0)
    say = lambda: dsv4_jax.generate(model, PROMPT % 96, max_new_tokens=12).tokens
    np.testing.assert_array_equal(plain(say), say())


@pytest.mark.slow
def test_a_model_that_is_gone_is_not_held(plain):
    model = random_weights(lambda: DeepseekV4(unquantised(), max_tokens=64, dtype=jnp.float32), seed=0)
    plain(functools.partial(prepare.ready, model))
    head = weakref.ref(model.lm_head.get_value())
    del model
    gc.collect()
    assert head() is None and not prepare._latest._leaves


def test_a_turned_weight_is_read_whole():
    w = jnp.arange(12.0).reshape(4, 3)
    x = jnp.ones((2, 5, 3))
    np.testing.assert_array_equal(linear(x, Turned.of(w)), x @ w.T)
    assert Turned.of(w)[...].shape == w.shape
    with pytest.raises(TypeError, match=r"\(4, 3\) cannot be indexed by 0"):
        Turned.of(w)[0]
