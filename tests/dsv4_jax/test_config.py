"""One config object from every spelling; whatever would change the model and is not understood is refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dsv4_jax.config import CSA, HCA, REQUIRED, SLIDING, ConfigError, LayerSpec, ModelConfig, Quantization, Yarn
from dsv4_jax.presets import PRESETS

RATIOS = [0, 0, *[4, 128] * 20, 4]  # Flash's 43 layers
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    compress_ratios=tuple(RATIOS),
    draft_ratios=(0,),
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    num_hash_layers=3,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_scaling=Yarn(factor=16.0, original_max_position_embeddings=65536, beta_fast=32.0, beta_slow=1.0),
    max_position_embeddings=1048576,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    draft="mtp",
    quantization=Quantization(block=(128, 128), expert_format="fp4", scale_format="e8m0"),
    bos_token_id=0,
    eos_token_id=1,
)
# Fields that every spelling writes alike.
SHARED = {
    "vocab_size": 129280,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "swiglu_limit": 10.0,
    "max_position_embeddings": 1048576,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "quantization_config": QUANTIZATION,
}
# What the official and the Hugging Face spelling share.
HUB = SHARED | {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "rms_norm_eps": 1e-6,
    "sliding_window": 128,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
}
OFFICIAL = HUB | {
    "qk_rope_head_dim": 64,
    "compress_ratios": [*RATIOS, 0],
    "num_hash_layers": 3,
    "topk_method": "noaux_tc",
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
}
INFERENCE = SHARED | {
    "dim": 4096,
    "n_layers": 43,
    "n_heads": 64,
    "n_activated_experts": 6,
    "moe_inter_dim": 2048,
    "score_func": "sqrtsoftplus",
    "route_scale": 1.5,
    "norm_eps": 1e-6,
    "rope_head_dim": 64,
    "window_size": 128,
    "n_hash_layers": 3,
    "n_mtp_layers": 1,
    "compress_ratios": [*RATIOS, 0],
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_factor": 16,
    "original_seq_len": 65536,
    "beta_fast": 32,
    "beta_slow": 1,
    "max_batch_size": 4,
    "max_seq_len": 4096,
}
HUGGING_FACE = HUB | {
    "layer_types": [{0: SLIDING, 4: CSA, 128: HCA}[ratio] for ratio in RATIOS],
    "compress_rates": {CSA: 4, HCA: 128},
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
    "partial_rotary_factor": 0.125,
    "rope_parameters": {
        "main": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.125},
        "compress": {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
            "rope_theta": 160000,
            "partial_rotary_factor": 0.125,
            "attention_factor": 1.0,
        },
    },
    "quantization_config": QUANTIZATION | {"expert_dtype": "fp4"},
    "dtype": "bfloat16",
    "mlp_bias": False,
    "pad_token_id": None,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
DSPARK = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}


def read(*without: str, **fields) -> ModelConfig:
    """Official Flash, with fields replaced or left out."""
    return ModelConfig.from_dict({k: v for k, v in (OFFICIAL | fields).items() if k not in without})


# --- what is accepted


@pytest.mark.parametrize("fields", [OFFICIAL, INFERENCE, HUGGING_FACE], ids=["official", "inference", "hugging face"])
def test_every_spelling_gives_the_same_object(fields):
    assert ModelConfig.from_dict(fields) == FLASH


def test_a_config_is_hashable_and_json_gives_the_same(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(OFFICIAL))
    assert ModelConfig.from_json(path) == FLASH and hash(ModelConfig.from_json(path)) == hash(FLASH)


def test_reading_leaves_the_fields_alone():
    fields = json.loads(json.dumps(HUGGING_FACE))
    ModelConfig.from_dict(fields)
    assert fields == HUGGING_FACE


@pytest.mark.parametrize(
    ("name", "sliding", "csa", "hca"),
    [
        ("flash", 2, 21, 20),
        ("pro", 0, 30, 31),
        ("flash-base", 2, 21, 20),
        ("pro-base", 0, 30, 31),
        ("tiny", 1, 3, 2),
    ],  # fmt: skip
)
def test_layer_schedules_of_the_presets(name, sliding, csa, hca):
    config = ModelConfig.from_dict(PRESETS[name])
    kinds = [layer.kind for layer in config.layers]
    assert [kinds.count(kind) for kind in (SLIDING, CSA, HCA)] == [sliding, csa, hca]
    assert len(kinds) == config.num_hidden_layers and kinds[-1] == CSA
    assert [i for i, layer in enumerate(config.layers) if layer.hashed] == [0, 1, 2]
    assert config.draft == "mtp" and config.mtp_layers == (LayerSpec(0, hashed=False),)


def test_flash_preset_is_the_published_flash():
    assert ModelConfig.from_dict(PRESETS["flash"]) == FLASH


def test_pro_differs_from_flash_in_what_the_table_says():
    flash, pro = (dataclasses.asdict(ModelConfig.from_dict(PRESETS[name])) for name in ("flash", "pro"))
    changed = {name: value for name, value in pro.items() if value != flash[name]}
    assert changed == {
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "index_topk": 1024,
        "n_routed_experts": 384,
        "moe_intermediate_size": 3072,
        "routed_scaling_factor": 2.5,
        "compress_ratios": (128, 128, *[4, 128] * 29, 4),
    }


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_base_variants_differ_in_weight_formats_only(name):
    config, base = (ModelConfig.from_dict(PRESETS[preset]) for preset in (name, f"{name}-base"))
    assert config.quantization == Quantization((128, 128), "fp4", "e8m0")
    assert base == dataclasses.replace(config, quantization=Quantization((128, 128), "fp8", "f32"))


def test_the_first_hub_revision_did_not_name_its_fp4_experts():
    assert read("expert_dtype") == FLASH


def test_without_quantization():
    config = read("quantization_config", "expert_dtype")
    assert config == dataclasses.replace(FLASH, quantization=None)


def test_without_a_draft_layer():
    config = read(num_nextn_predict_layers=0, compress_ratios=RATIOS)
    assert (config.draft, config.mtp_layers, len(config.layers)) == ("none", (), 43)


def test_layer_types_say_nothing_of_the_draft_layer_which_is_sliding():
    assert ModelConfig.from_dict(HUGGING_FACE).mtp_layers == (LayerSpec(0, hashed=False),)


def test_any_ratio_but_0_and_4_is_hca():
    config = read(compress_ratios=[0, 2, 8, 4, *RATIOS[4:], 0])
    assert [layer.kind for layer in config.layers[:4]] == [SLIDING, HCA, HCA, CSA]
    assert [layer.ratio for layer in config.layers[:4]] == [0, 2, 8, 4]


def test_rope_without_scaling():
    assert read("rope_scaling").rope_scaling is None
    assert read(rope_scaling={"rope_type": "default"}).rope_scaling is None


@pytest.mark.parametrize("stated", [1, 3])
def test_dspark_is_known_by_its_own_fields(stated):
    """Three drafter entries follow the 43 layers, whatever num_nextn_predict_layers says."""
    ratios = [*RATIOS, 0, 0, 0]
    assert len(ratios) == 46
    config = read(compress_ratios=ratios, num_nextn_predict_layers=stated, **DSPARK)
    assert config == dataclasses.replace(FLASH, draft="dspark", draft_ratios=())
    assert config.mtp_layers == () and len(config.layers) == 43


# --- what is refused


def test_v41_is_refused_with_a_sentence():
    with pytest.raises(
        ConfigError, match="'deepseek_v41' is another architecture .*implements DeepSeek-V4 Flash and Pro"
    ):
        ModelConfig.from_dict({"model_type": "deepseek_v41", "text_config": {}, "vision_config": {}})


@pytest.mark.parametrize("field", [*REQUIRED, "qk_rope_head_dim", "compress_ratios", "num_hash_layers"])
def test_a_missing_field_is_named(field):
    with pytest.raises(ConfigError, match=field):
        read(field)


@pytest.mark.parametrize("field", ["n_group", "first_k_dense_replace", "text_config", "rope_interleave"])
def test_an_unknown_field_is_named(field):
    with pytest.raises(ConfigError, match=f"unknown field.*{field}"):
        read(**{field: 1})


def test_an_unknown_field_that_is_null_says_nothing():
    assert read(n_group=None) == FLASH


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "deepseek_v3"),
        ("num_key_value_heads", 64),
        ("n_shared_experts", 2),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("norm_topk_prob", False),
        ("scoring_func", "sigmoid"),
        ("topk_method", "greedy"),
        ("tie_word_embeddings", True),
    ],
)
def test_an_unsupported_choice_is_named(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value!r} is not supported; expected"):
        read(**{field: value})


@pytest.mark.parametrize("field", ["hidden_size", "index_topk", "swiglu_limit", "hc_sinkhorn_iters"])
@pytest.mark.parametrize("value", ["128", -1, 0, True, [128], float("nan"), float("inf")])
def test_a_field_that_is_no_positive_number_is_named(field, value):
    with pytest.raises(ConfigError, match=f"{field}=.* must be"):
        read(**{field: value})


def test_an_integer_field_may_not_be_a_fraction():
    with pytest.raises(ConfigError, match="hidden_size=4096.5 must be an integer"):
        read(hidden_size=4096.5)
    assert read(hidden_size=4096.0) == FLASH


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dim": 2048}, "dim"),
        ({"rope_head_dim": 32}, "rope_head_dim"),
        ({"score_func": "sigmoid"}, "score_func"),
        ({"partial_rotary_factor": 0.5}, "qk_rope_head_dim=64 contradicts partial_rotary_factor=0.5"),
        ({"layer_types": [SLIDING] * 43}, "layer_types contradicts compress_ratios"),
        ({"mlp_layer_types": ["hash_moe"] * 4 + ["moe"] * 39}, "num_hash_layers is given twice"),
        ({"rope_parameters": {"main": {"rope_theta": 5e5}, "compress": {}}}, "rope_theta is given twice"),
        ({"rope_parameters": {"main": {}, "compress": {"rope_theta": 5e5}}}, "compress_rope_theta is given twice"),
        ({"quantization_config": QUANTIZATION | {"expert_dtype": "fp8"}}, "expert_dtype is given twice"),
        ({"num_nextn_predict_layers": 2}, "1 entries after the 43 layers, but num_nextn_predict_layers=2"),
    ],
)
def test_fields_that_contradict_each_other_are_named(fields, named):
    with pytest.raises(ConfigError, match=named):
        read(**fields)


@pytest.mark.parametrize("dropped", ["num_attention_heads", "num_experts_per_tok", "head_dim"])
def test_sizes_that_do_not_fit_are_named(dropped):
    wrong = {"num_attention_heads": 60, "num_experts_per_tok": 257, "head_dim": 32}
    with pytest.raises(ConfigError, match=dropped):
        read(**{dropped: wrong[dropped]})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"index_head_dim": 32}, "qk_rope_head_dim=64 exceeds index_head_dim"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63 must be even"),
        ({"compress_ratios": [*RATIOS, 4]}, "MTP layers must be sliding"),
        ({"compress_ratios": RATIOS[:-1]}, "compress_ratios has 42 entries for num_hidden_layers=43"),
        ({"compress_ratios": 4}, "compress_ratios=4 must be a list"),
        ({"compress_ratios": [1, *RATIOS[1:], 0]}, "compress_ratios=.* must hold 0"),
        ({"compress_ratios": [-4, *RATIOS[1:], 0]}, "compress_ratios=.* must hold 0"),
        ({"compress_ratios": ["4", *RATIOS[1:], 0]}, "compress_ratios=.* must hold 0"),
        ({"compress_ratios": [4.5, *RATIOS[1:], 0]}, "compress_ratios=.* must hold 0"),
        ({"num_hash_layers": 44}, "num_hash_layers=44 must be an integer between 0 and 43"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1"),
        ({"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers='1'"),
    ],
)
def test_a_wrong_schedule_or_shape_is_named(fields, named):
    with pytest.raises(ConfigError, match=named):
        read(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layer_types": ["full_attention"] * 43}, "layer_types has unknown kinds .'full_attention'."),
        ({"layer_types": [SLIDING] * 42}, "42 entries for num_hidden_layers=43"),
        ({"compress_rates": {CSA: 8, HCA: 128}}, "CSA rate 8 is not supported; expected 4"),
        ({"mlp_layer_types": ["moe"] * 40 + ["hash_moe"] * 3}, "mlp_layer_types must be hash_moe layers followed"),
    ],
)
def test_a_wrong_hugging_face_schedule_is_named(fields, named):
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(HUGGING_FACE | fields)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"type": "linear"}, "rope_scaling 'linear' is not supported"),
        ({"attention_factor": 1.277}, "attention_factor 1.0"),
        ({"mscale": 1.0}, "unknown fields .'mscale'."),
        ({"factor": None}, "rope_scaling.factor=None must be a positive number"),
        ({"factor": -16}, "rope_scaling.factor=-16"),
        ({"beta_fast": "32"}, "rope_scaling.beta_fast='32'"),
    ],
)
def test_a_wrong_rope_scaling_is_named(change, named):
    with pytest.raises(ConfigError, match=named):
        read(rope_scaling=OFFICIAL["rope_scaling"] | change)


@pytest.mark.parametrize("field", ["factor", "original_max_position_embeddings"])
def test_a_missing_rope_scaling_field_is_named(field):
    with pytest.raises(ConfigError, match=f"missing fields .'{field}'."):
        read(rope_scaling={k: v for k, v in OFFICIAL["rope_scaling"].items() if k != field})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"expert_dtype": "int4"}, "expert_dtype='int4' is not supported"),
        ({"quantization_config": None}, "expert_dtype='fp4' needs a quantization_config"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8' must be a JSON object"),
        *(
            ({"quantization_config": QUANTIZATION | {name: "other"}}, f"quantization_config.{name} must be")
            for name in ("quant_method", "fmt", "activation_scheme", "scale_fmt")
        ),
        *(
            ({"quantization_config": QUANTIZATION | {"weight_block_size": block}}, "weight_block_size=.* must be two")
            for block in ([128], [128, 0], [128, "128"], 128)
        ),
        ({"quantization_config": QUANTIZATION | {"group_size": 32}}, "unknown quantization_config.*'group_size'"),
    ],
)
def test_a_wrong_quantization_is_named(fields, named):
    with pytest.raises(ConfigError, match=named):
        read(**fields)


@pytest.mark.parametrize("fields", [[], "deepseek_v4", None, 4])
def test_what_is_no_object_is_refused(fields):
    with pytest.raises(ConfigError, match="config must be a JSON object"):
        ModelConfig.from_dict(fields)


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    for content, named in ((b"{", "cannot be read as JSON"), (b"\xff\xfe", "cannot be read"), (b"{}", "is missing")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=named) as refusal:
            ModelConfig.from_json(path)
        assert str(refusal.value).startswith(str(path))
    with pytest.raises(ConfigError, match="absent.json"):
        ModelConfig.from_json(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mlp_layer_types": ["hash_moe"] * 3}, "mlp_layer_types=.* must be a list of 43"),
        ({"compress_rate_hca": 64}, "heavily_compressed_attention rate 64 contradicts 128 in compress_ratios"),
        ({"compress_rates": {CSA: 8}}, "compressed_sparse_attention rate 8 contradicts 4"),
        ({"compress_rates": {"x": 4}}, "compress_rates has unknown kinds .'x'."),
        ({"compress_rates": 3}, "compress_rates=3 must be a JSON object"),
        ({"layer_types": 3}, "layer_types=3 must be a list"),
        ({"rope_parameters": 3}, "rope_parameters=3 must be a JSON object"),
        (
            {"rope_parameters": {"main": {"rope_type": "yarn"}}},
            "rope_parameters.main.rope_type='yarn' is not supported",
        ),
        ({"partial_rotary_factor": "x"}, "partial_rotary_factor='x' must be a number"),
        ({"compress_ratios": [*RATIOS, 0, 0, 0]}, "3 entries after the 43 layers, but num_nextn_predict_layers=1"),
    ],
)
def test_spellings_that_disagree_are_named(fields, named):
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(PRESETS["flash"] | fields)
