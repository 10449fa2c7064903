"""Configurations that the benchmarks synthesise: the parts of Flash, unquantised, at sizes that a CPU can run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from checkpoints.synth import official_tensors
from dsv4_jax.config import ModelConfig
from dsv4_jax.presets import PRESETS

_UNQUANTISED = {k: v for k, v in PRESETS["flash"].items() if k not in ("expert_dtype", "quantization_config")} | {
    "num_nextn_predict_layers": 0,  # transformers has no MTP layer, so neither side carries one
    "head_dim": 128,
    "num_experts_per_tok": 4,
    "index_n_heads": 8,
    "index_head_dim": 64,
    "index_topk": 128,  # of 256 entries after 1,024 tokens: the indexer has a choice to make
}

# 74,733,061 parameters, all kinds of layer.
B75M: dict[str, Any] = _UNQUANTISED | {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "q_lora_rank": 256,
    "o_groups": 4,
    "o_lora_rank": 256,
    "n_routed_experts": 16,
    "moe_intermediate_size": 256,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 128],
}

# 608,783,777 parameters.
B600M: dict[str, Any] = _UNQUANTISED | {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "q_lora_rank": 512,
    "o_groups": 4,
    "o_lora_rank": 512,
    "n_routed_experts": 32,
    "moe_intermediate_size": 512,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 128, 4, 128],
}

MODELS: dict[str, dict[str, Any]] = {"75M": B75M, "600M": B600M}


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a checkpoint of this config: every tensor but block scales and the hash table `tid2eid`."""
    total = 0
    for name, (dtype, shape) in official_tensors(ModelConfig.from_dict(config)).items():
        if name.endswith((".scale", ".tid2eid")):
            continue
        total += math.prod(shape) * (2 if dtype == "I8" else 1)  # two fp4 codes to a byte
    return total
