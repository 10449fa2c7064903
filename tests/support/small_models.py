"""Models of random weights that are small and have every kind of layer."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from dsv4_jax import DeepseekV4, ModelConfig
from dsv4_jax.presets import PRESETS
from dsv4_jax.random_weights import random_weights


@functools.lru_cache
def small(layers: int = 1) -> DeepseekV4:
    """Every kind of layer at the published ratios, random weights, float32, `layers` MTP layers."""
    fields = PRESETS["tiny"] | {
        "num_hidden_layers": 3, "compress_ratios": [0, 4, 128] + [0] * layers, "num_nextn_predict_layers": layers,
        "vocab_size": 64, "hidden_size": 64, "head_dim": 64, "qk_rope_head_dim": 32, "q_lora_rank": 32,
        "sliding_window": 16, "index_topk": 8, "num_hash_layers": 1, "quantization_config": None, "expert_dtype": None,
    }  # fmt: skip
    config = ModelConfig.from_dict(fields)
    return random_weights(lambda: DeepseekV4(config, max_tokens=512, dtype=jnp.float32), seed=2)
