"""Compressors on a platform that pools from written rings, beside the portable one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.cache import CacheFormat, Step, init_layer_cache
from dsv4_jax.compressor import Compressor, entry_index
from dsv4_jax.config import LayerSpec, ModelConfig
from dsv4_jax.kernels import Kernels, TpuKernels, XlaKernels
from dsv4_jax.presets import PRESETS
from dsv4_jax.rope import RopeSpec, RopeTable, apply_rope
from pallas_kernels.chips import chip

DIM, MAX = 128, 512


def store(entries, norm, rotation, held):
    return apply_rope(norm(entries), rotation)


@pytest.mark.parametrize("drafts", [0, 2, 3])
@pytest.mark.parametrize("ratio", [4, 128])
def test_entries_pooled_from_written_rings(ratio, drafts):
    """Steps of as many tokens as fit, of which some are padding and some are rejected."""
    sizes = {"hidden_size": 32, "head_dim": DIM, "index_head_dim": DIM, "qk_rope_head_dim": 16}
    config, spec = ModelConfig.from_dict(PRESETS["tiny"] | sizes), LayerSpec(ratio, hashed=False)
    rng = np.random.default_rng(ratio + drafts)
    random = lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype)
    plain = Compressor(config, spec, XlaKernels(), DIM, jnp.float32)
    nnx.update(plain, jax.tree.map(random, nnx.state(plain)))
    fast = Compressor(config, spec, TpuKernels(chip("v6e"), interpret=True), DIM, jnp.float32)
    nnx.update(fast, nnx.state(plain))
    table, B = RopeTable(RopeSpec(10000.0, 16), MAX), 3

    @jax.jit
    def advance(module, cache, x, step):
        rotation = table(entry_index(step, ratio) * ratio)
        return module(module.project(x, step), rotation, cache, step, store)

    empty = init_layer_cache(config, spec, B, MAX, CacheFormat(jnp.float32), drafts=drafts).compressor
    caches, length = [empty, empty], np.zeros(B, int)
    for T in (120, *(drafts + 1,) * 24):
        x = jnp.asarray(rng.normal(size=(B, T, 32)), jnp.float32)
        count = np.array([T, T - 1, 3]) if T == 120 else rng.integers(0, T + 1, B)
        step = Step(jnp.zeros((B, T), jnp.int32), jnp.asarray(length, jnp.int32), jnp.asarray(count, jnp.int32))
        caches = [advance(module, cache, x, step) for module, cache in zip((plain, fast), caches, strict=True)]
        length = length + (count if T == 120 else rng.integers((count + 1) // 2, count + 1))
    want, got = caches
    assert length.max() > 128
    for b, held in enumerate(length // ratio):
        np.testing.assert_allclose(got.entries[b, :held], want.entries[b, :held], rtol=1e-5, atol=1e-5)
    for a, c in ((got.kv, want.kv), (got.gate, want.gate)):
        np.testing.assert_array_equal(a, c)


def test_long_steps_pool_from_rows_read_before():
    class Counted(XlaKernels):
        pools_rings = True

        def pool_window(self, *args, **sizes):
            raise AssertionError("pooled from the written ring")

    config = ModelConfig.from_dict(PRESETS["tiny"] | {"hidden_size": 32})
    run = functools.partial(abstract_step, config, Counted())
    for ratio, T, drafts in ((4, 2, 0), (4, 5, 4), (4, 64, 0), (128, 3, 1)):
        run(ratio, T, drafts)
    with pytest.raises(AssertionError, match="from the written ring"):
        run(4, 4, 3)


def abstract_step(config: ModelConfig, kernels: Kernels, ratio: int, T: int, drafts: int):
    spec = LayerSpec(ratio, hashed=False)
    module = Compressor(config, spec, kernels, config.head_dim, jnp.float32)
    table = RopeTable(RopeSpec(10000.0, 16), MAX)
    cache = init_layer_cache(config, spec, 1, MAX, CacheFormat(jnp.float32), drafts=drafts).compressor
    step = Step(jnp.zeros((1, T), jnp.int32), jnp.zeros(1, jnp.int32), jnp.full(1, T, jnp.int32))
    rotation = table(entry_index(step, ratio) * ratio)
    run = lambda x: module(module.project(x, step), rotation, cache, step, store)
    return jax.eval_shape(run, jnp.zeros((1, T, config.hidden_size)))
