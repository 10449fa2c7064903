"""RoPE tables as a model builds them; the arithmetic itself is compared in test_golden_ops.py."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import DeepseekV4
from dsv4_jax.config import ModelConfig, Yarn
from dsv4_jax.presets import PRESETS
from dsv4_jax.rope import RopeSpec, RopeTable, apply_rope, build_table, rope_specs

YARN = Yarn(factor=16.0, original_max_position_embeddings=65536, beta_fast=32.0, beta_slow=1.0)
MAIN, COMPRESS = RopeSpec(10000.0, 64), RopeSpec(160000.0, 64, YARN)


@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_published_models_rotate_with_a_plain_and_a_yarn_table(preset):
    assert rope_specs(ModelConfig.from_dict(PRESETS[preset])) == (MAIN, COMPRESS)


def test_yarn_leaves_fast_pairs_and_divides_slow_ones():
    plain, scaled = RopeSpec(160000.0, 64).inv_freq(), COMPRESS.inv_freq()
    np.testing.assert_array_equal(scaled[:16], plain[:16])  # up to pair 15
    np.testing.assert_array_equal(scaled[25:], plain[25:] / 16)  # from pair 25
    between = plain[16:25] / scaled[16:25]
    assert (np.diff(between) > 0).all() and between[0] > 1 and between[-1] < 16


@pytest.mark.parametrize("spec", [MAIN, COMPRESS], ids=["main", "compress"])
def test_compiled_and_eager_builds_agree_bit_for_bit(spec):
    eager, compiled = build_table(spec, 1 << 17), jax.jit(build_table, static_argnums=(0, 1))(spec, 1 << 17)
    np.testing.assert_array_equal(compiled.cos, eager.cos)
    np.testing.assert_array_equal(compiled.sin, eager.sin)


def test_a_filled_table_is_the_eager_one():
    eager, lazy = RopeTable(COMPRESS, 64), jax.eval_shape(lambda: RopeTable(COMPRESS, 64))
    assert lazy.is_abstract and not eager.is_abstract
    lazy.fill()
    assert not lazy.is_abstract
    np.testing.assert_array_equal(lazy.cos[...], eager.cos[...])
    np.testing.assert_array_equal(lazy.sin[...], eager.sin[...])


def test_reading_a_table_by_position():
    table = RopeTable(MAIN, 8)
    at = table(jnp.asarray([[0, 7], [3, 900]]))
    assert at.cos.shape == at.sin.shape == (2, 2, 32)
    np.testing.assert_array_equal(at.cos, table.cos[...][np.asarray([[0, 7], [3, 7]])])  # past the end: the last row
    np.testing.assert_array_equal(at.sin[0, 0], np.zeros(32))


def test_relative_position_is_all_a_product_of_rotated_vectors_sees():
    """The point of RoPE: q at p and k at p - d have the same product for every p."""
    table = RopeTable(MAIN, 4096)
    q, k = (jnp.broadcast_to(x, (3, 96)) for x in jax.random.normal(jax.random.key(0), (2, 96)))
    p = jnp.asarray([100, 1000, 4000])
    products = jnp.sum(apply_rope(q, table(p)) * apply_rope(k, table(p - 37)), axis=-1)
    np.testing.assert_allclose(products, products[0], atol=2e-3)
    other = jnp.sum(apply_rope(q, table(p)) * apply_rope(k, table(p - 5)), axis=-1)
    assert (jnp.abs(other - products) > 0.05).all()


@pytest.mark.parametrize("T", [1, 64])
def test_a_step_reads_the_tables_once_for_all_layers_of_a_kind(T):
    def reads(ratios: list[int]) -> int:
        fields = {"num_hidden_layers": len(ratios), "compress_ratios": [*ratios, 0], "num_hash_layers": 0}
        config = ModelConfig.from_dict(PRESETS["tiny"] | fields)
        model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=4096))
        cache = jax.eval_shape(lambda: model.init_cache(2))
        tokens, count = jax.ShapeDtypeStruct((2, T), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
        program = str(jax.make_jaxpr(lambda model, *args: model(*args))(model, tokens, cache, count))
        return len(re.findall(rf":f32\[2,\d+,{config.qk_rope_head_dim // 2}\] = gather", program))

    few, many = reads([0, 4, 128]), reads([0, 4, 128, 0, 4, 128, 4])
    assert 0 < few == many
