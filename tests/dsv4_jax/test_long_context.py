"""A long prompt: no array of queries times context, and what does not fit is refused before any work."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import slow
from small_models import small

import dsv4_jax
from dsv4_jax import DeepseekV4, ModelConfig
from dsv4_jax.presets import PRESETS

CHUNK = 480  # queries; no other size of the model
FEW = PRESETS["flash"] | {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1}


def arrays_of_a_chunk(context: int) -> list[tuple[int, ...]]:
    """The shapes in the lowered prefill of one chunk of Flash's own layers, one of each kind."""
    config = ModelConfig.from_dict(FEW)
    model = jax.eval_shape(lambda: DeepseekV4(config, max_tokens=context, dtype=jnp.bfloat16, kernels="xla"))
    cache = jax.eval_shape(lambda: model.init_cache(1))
    tokens, count = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    text = jax.jit(lambda model, *args: model(*args)).lower(model, tokens, cache, count).as_text()
    return [tuple(map(int, dims.split("x")[:-1])) for dims in set(re.findall(r"tensor<((?:\d+x)+[a-z]\w+)>", text))]


@pytest.mark.parametrize("context", [slow(400_000), 1_048_576])
def test_no_array_of_queries_times_context(context):
    entries = {context, context // 4, context // 128}
    shapes = arrays_of_a_chunk(context)
    assert any(context // 4 in shape for shape in shapes)  # the CSA entries themselves
    wide = [shape for shape in shapes if entries & set(shape) and CHUNK in shape]
    assert all(max(entries & set(shape)) == context // 128 for shape in wide), wide


def test_a_prompt_longer_than_the_cache_is_refused_before_any_work():
    model = small()
    with pytest.raises(ValueError, match="do not fit the cache of 512.*max_tokens=600"):
        dsv4_jax.generate(model, np.ones((1, 590), np.int32), max_new_tokens=10)
