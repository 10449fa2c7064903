"""One config from every published spelling; anything unknown, missing or contradictory is refused by name."""

from __future__ import annotations

import json

import pytest

from dsv4_jax.config import CSA, HCA, SLIDING, ConfigError, ModelConfig
from dsv4_jax.presets import PRESETS

FLASH = PRESETS["flash"]


def hugging_face_flash() -> dict:
    """Flash as transformers writes it (architecture 1.3)."""
    drop = (
        "qk_rope_head_dim",
        "compress_ratios",
        "num_hash_layers",
        "rope_theta",
        "compress_rope_theta",
        "rope_scaling",
    )
    fields = {k: v for k, v in FLASH.items() if k not in drop}
    yarn = {
        "rope_type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    kinds = [SLIDING, SLIDING, *[CSA, HCA] * 20, CSA]
    return fields | {
        "partial_rotary_factor": 64 / 512,
        "layer_types": kinds,
        "compress_rates": {CSA: 4, HCA: 128},
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000},
            "compress": yarn | {"rope_theta": 160000, "attention_factor": 1.0},
        },
    }


def inference_flash() -> dict:
    """Flash as its `inference/config.json` (architecture 1.3)."""
    names = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "qk_rope_head_dim": "rope_head_dim",
        "sliding_window": "window_size",
        "num_hash_layers": "n_hash_layers",
        "moe_intermediate_size": "moe_inter_dim",
        "num_experts_per_tok": "n_activated_experts",
        "routed_scaling_factor": "route_scale",
        "scoring_func": "score_func",
        "num_nextn_predict_layers": "n_mtp_layers",
    }
    fields = {names.get(k, k): v for k, v in FLASH.items() if k != "rope_scaling"}
    return fields | {"rope_factor": 16, "original_seq_len": 65536, "beta_fast": 32, "beta_slow": 1}


@pytest.mark.parametrize("spelling", [hugging_face_flash, inference_flash])
def test_spellings_give_the_same_object(spelling):
    assert ModelConfig.from_dict(spelling()) == ModelConfig.from_dict(FLASH)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name]))
    assert ModelConfig.from_json(tmp_path / "config.json") == ModelConfig.from_dict(PRESETS[name])


@pytest.mark.parametrize(("name", "counts"), [("flash", (2, 21, 20)), ("pro", (0, 30, 31))])
def test_layer_schedule(name, counts):
    config = ModelConfig.from_dict(PRESETS[name])
    kinds = [spec.kind for spec in config.layers]
    assert tuple(kinds.count(kind) for kind in (SLIDING, CSA, HCA)) == counts
    assert [spec.hashed for spec in config.layers[:5]] == [True, True, True, False, False]
    assert [(spec.kind, spec.hashed) for spec in config.mtp_layers] == [(SLIDING, False)]
    assert hash(config) == hash(ModelConfig.from_dict(PRESETS[name]))


def test_base_variants_differ_in_formats_alone():
    flash, base = (ModelConfig.from_dict(PRESETS[name]) for name in ("flash", "flash-base"))
    assert (flash.quantization.expert_format, flash.quantization.scale_format) == ("fp4", "e8m0")
    assert (base.quantization.expert_format, base.quantization.scale_format) == ("fp8", "f32")


def test_dspark_release_has_no_mtp_layers():
    extra = {"dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_target_layer_ids": [40, 41, 42]}
    config = ModelConfig.from_dict(FLASH | extra | {"compress_ratios": [*FLASH["compress_ratios"], 0, 0]})
    assert config.draft == "dspark" and config.mtp_layers == () and len(config.layers) == 43


def test_another_architecture_is_refused_with_a_sentence():
    with pytest.raises(ConfigError, match="deepseek_v41.*another architecture.*DeepSeek-V4 Flash and Pro only"):
        ModelConfig.from_dict({"model_type": "deepseek_v41", "text_config": {}})


REFUSED = {
    "unknown field": ({"n_group": 8}, r"unknown field\(s\) \['n_group'\]"),
    "two spellings": ({"dim": 4097}, "dim=4097 contradicts hidden_size=4096"),
    "scoring": ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported"),
    "bias": ({"attention_bias": True}, "attention_bias=True is not supported"),
    "key heads": ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    "groups": ({"o_groups": 7}, "o_groups=7 does not divide"),
    "too many experts": ({"num_experts_per_tok": 300}, "num_experts_per_tok=300 exceeds"),
    "float size": ({"hidden_size": 4096.5}, "hidden_size=4096.5 must be an integer"),
    "negative": ({"sliding_window": -1}, "sliding_window=-1 must be positive"),
    "short schedule": ({"compress_ratios": [0, 0, 4]}, "compress_ratios has 3 entries for num_hidden_layers=43"),
    "ratio one": ({"compress_ratios": [1] * 44}, "must hold 0"),
    "compressed MTP": ({"compress_ratios": [*[0] * 43, 4]}, "MTP layers must be sliding"),
    "schedule twice": ({"layer_types": [SLIDING] * 43}, "layer_types contradicts compress_ratios"),
    "hash layers": ({"num_hash_layers": 44}, "num_hash_layers=44 must be an integer between 0 and 43"),
    "hash layers twice": ({"mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 41}, "num_hash_layers is given twice"),
    "expert format": ({"expert_dtype": "int8"}, "expert_dtype='int8' is not supported"),
    "experts without quantisation": ({"quantization_config": None}, "expert_dtype='fp4' needs a quantization_config"),
    "scale format": (
        {"quantization_config": FLASH["quantization_config"] | {"scale_fmt": "float"}},
        "quantization_config.scale_fmt must be 'ue8m0'",
    ),
    "rope kind": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling 'linear' is not supported"),
    "yarn field": ({"rope_scaling": FLASH["rope_scaling"] | {"mscale": 1}}, r"unknown fields \['mscale'\]"),
    "rotary width": ({"partial_rotary_factor": 0.5}, "qk_rope_head_dim=64 contradicts partial_rotary_factor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    change, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(FLASH | change)


@pytest.mark.parametrize("field", ["hidden_size", "q_lora_rank", "compress_ratios", "index_topk", "qk_rope_head_dim"])
def test_missing_field_is_named(field):
    with pytest.raises(ConfigError, match=f"{field}'.*missing"):
        ModelConfig.from_dict({k: v for k, v in FLASH.items() if k != field})
