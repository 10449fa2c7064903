"""Synthetic checkpoints: the tensor table against the published one, and values a model can be run on."""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path

import numpy as np
import pytest

import checkpoints
import dsv4_jax
from checkpoints.errors import CheckpointError
from checkpoints.shards import ShardReader
from checkpoints.source import open_source
from checkpoints.synth import official_tensors, synth, with_layers
from dsv4_jax.config import ConfigError, ModelConfig
from dsv4_jax.presets import PRESETS

TINY = PRESETS["tiny"]
CONFIGS = {
    "fp4": TINY,
    "fp8base": TINY | {"expert_dtype": "fp8"},
    "bf16": {k: v for k, v in TINY.items() if k not in ("expert_dtype", "quantization_config")},
    # 192 and 320 are 1.5 and 2.5 blocks of 128; 96 is less than one.
    "partial blocks": TINY | {"q_lora_rank": 192, "hidden_size": 320, "moe_intermediate_size": 96},
    "no hash, no MTP": TINY | {"num_hash_layers": 0, "num_nextn_predict_layers": 0},
}
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# Tensors of layer 2 (CSA, hashed), 3 (HCA) and the MTP layer: name -> (dtype, Flash shape, Pro shape).
PUBLISHED = {
    "embed.weight": ("BF16", (129280, 4096), (129280, 7168)),
    "hc_head_fn": ("F32", (4, 16384), (4, 28672)),
    "layers.2.hc_attn_fn": ("F32", (24, 16384), (24, 28672)),
    "layers.2.hc_ffn_scale": ("F32", (3,), (3,)),
    "layers.2.attn.attn_sink": ("F32", (64,), (128,)),
    "layers.2.attn.wq_a.weight": ("F8_E4M3", (1024, 4096), (1536, 7168)),
    "layers.2.attn.wq_a.scale": ("F8_E8M0", (8, 32), (12, 56)),
    "layers.2.attn.wq_b.weight": ("F8_E4M3", (32768, 1024), (65536, 1536)),
    "layers.2.attn.wkv.scale": ("F8_E8M0", (4, 32), (4, 56)),
    "layers.2.attn.wo_a.weight": ("F8_E4M3", (8192, 4096), (16384, 4096)),
    "layers.2.attn.wo_b.weight": ("F8_E4M3", (4096, 8192), (7168, 16384)),
    "layers.2.attn.compressor.ape": ("F32", (4, 1024), (4, 1024)),
    "layers.3.attn.compressor.ape": ("F32", (128, 512), (128, 512)),
    "layers.2.attn.compressor.wgate.weight": ("BF16", (1024, 4096), (1024, 7168)),
    "layers.3.attn.compressor.wkv.weight": ("BF16", (512, 4096), (512, 7168)),
    "layers.2.attn.indexer.compressor.ape": ("F32", (4, 256), (4, 256)),
    "layers.2.attn.indexer.compressor.norm.weight": ("BF16", (128,), (128,)),
    "layers.2.attn.indexer.wq_b.weight": ("F8_E4M3", (8192, 1024), (8192, 1536)),
    "layers.2.attn.indexer.weights_proj.weight": ("BF16", (64, 4096), (64, 7168)),
    "layers.2.ffn.gate.tid2eid": ("I64", (129280, 6), (129280, 6)),
    "layers.3.ffn.gate.bias": ("F32", (256,), (384,)),
    "layers.3.ffn.experts.255.w1.weight": ("I8", (2048, 2048), (3072, 3584)),
    "layers.3.ffn.experts.255.w1.scale": ("F8_E8M0", (2048, 128), (3072, 224)),
    "layers.3.ffn.experts.255.w2.weight": ("I8", (4096, 1024), (7168, 1536)),
    "layers.3.ffn.experts.255.w2.scale": ("F8_E8M0", (4096, 64), (7168, 96)),
    "layers.3.ffn.shared_experts.w2.scale": ("F8_E8M0", (32, 16), (56, 24)),
    "mtp.0.e_proj.weight": ("F8_E4M3", (4096, 4096), (7168, 7168)),
    "mtp.0.ffn.gate.bias": ("F32", (256,), (384,)),
    "mtp.0.hc_head_fn": ("F32", (4, 16384), (4, 28672)),
}
ABSENT = (
    "layers.2.ffn.gate.bias",
    "layers.3.ffn.gate.tid2eid",
    "layers.3.attn.indexer.wq_b.weight",
    "mtp.0.ffn.gate.tid2eid",
    "mtp.0.attn.compressor.ape",
    "mtp.0.embed.weight",
    "layers.2.attn.wq_a.bias",
)
TENSORS_BY_DTYPE = {
    "flash": {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I8": 33_792, "I64": 3},
    "pro": {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71_952, "I8": 71_424, "I64": 3},
}


@pytest.fixture(scope="module", params=CONFIGS)
def made(request, tmp_path_factory) -> tuple[dict, Path]:
    """A config and the checkpoint made for it, in several shards."""
    config = CONFIGS[request.param]
    return config, synth(config, tmp_path_factory.mktemp("synth") / "out", seed=3, shard_bytes=500_000)


@pytest.mark.parametrize("column, name", [(0, "flash"), (1, "pro")])
def test_table_of_the_published_checkpoints(column, name):
    tensors = official_tensors(ModelConfig.from_dict(PRESETS[name]))
    assert {key: tensors.get(key) for key in PUBLISHED} == {
        key: (dtype, shapes[column]) for key, (dtype, *shapes) in PUBLISHED.items()
    }
    assert not set(ABSENT) & set(tensors)
    assert collections.Counter(dtype for dtype, _ in tensors.values()) == TENSORS_BY_DTYPE[name]


def test_layer_kinds_decide_the_tensors():
    """Ratio 4 has compressor and indexer, any other but 0 a compressor half as wide, 0 neither."""
    config = ModelConfig.from_dict(TINY | {"compress_ratios": [0, 4, 8, 128, 2, 4, 0]})
    tensors = official_tensors(config)
    wkv = [tensors.get(f"layers.{n}.attn.compressor.wkv.weight", ("", (0,)))[1][0] for n in range(6)]
    assert wkv == [0, 256, 128, 128, 128, 256]
    ape = [tensors[f"layers.{n}.attn.compressor.ape"][1] for n in range(1, 6)]
    assert ape == [(4, 256), (8, 128), (128, 128), (2, 128), (4, 256)]
    indexers = {name.split(".")[1] for name in tensors if ".indexer." in name}
    assert indexers == {"1", "5"}


def test_checkpoint_is_what_its_config_says(made):
    config, path = made
    parsed = ModelConfig.from_dict(config)
    reader = ShardReader(path)
    assert {n: (t.dtype, t.shape) for n, t in reader.tensors.items()} == official_tensors(parsed)
    assert len(reader.files) > 1
    assert json.loads((path / "config.json").read_text()) == config
    assert open_source(path).config == parsed
    assert checkpoints.inspect(path).tensors == len(reader.tensors)


def test_shards_stay_below_their_limit(made):
    reader = ShardReader(made[1])
    for file in reader.files:
        sizes = [info.nbytes for info in reader.tensors.values() if info.file == file]
        assert sum(sizes) <= 500_000 or len(sizes) == 1


def test_values_are_sensible(made):
    config, path = made
    reader = ShardReader(path)
    for name, info in reader.tensors.items():
        if info.dtype not in ("I8", "I64"):
            values = reader.read(name).astype(np.float32)
            assert np.isfinite(values).all(), name
            assert values.size == 1 or values.std() > 0 or name.endswith(".scale"), f"{name} is constant"
        if name.endswith("norm.weight"):
            assert abs(values.mean() - 1) < 0.1, name
        elif name.endswith(".scale"):
            assert (values > 0).all(), name


def test_hashed_tokens_go_to_distinct_experts(made):
    config, path = made
    reader = ShardReader(path)
    tables = [name for name in reader.tensors if name.endswith("tid2eid")]
    assert len(tables) == config["num_hash_layers"]
    for name in tables:
        ids = reader.read(name)
        assert (np.diff(np.sort(ids, axis=1)) > 0).all()
        assert set(ids.ravel()) == set(range(config["n_routed_experts"]))


def test_weights_keep_the_size_of_activations(made):
    """Dequantised entries have a variance near 1 / fan-in: exactly on average, within a few block scales each."""
    reader = ShardReader(made[1])
    gains = collections.defaultdict(list)
    for name in reader.tensors:
        if name.endswith(".weight") and len(reader.tensors[name].shape) == 2 and name != "embed.weight":
            weight = dequantized(reader, name)
            gains[reader.tensors[name].dtype].append(weight.std() * math.sqrt(weight.shape[1]))
    for dtype, values in gains.items():
        assert 0.2 < min(values) and max(values) < 2.5, dtype
        assert 0.7 < np.sqrt(np.mean(np.square(values))) < 1.5, dtype


def dequantized(reader: ShardReader, name: str) -> np.ndarray:
    """Stored x scale, float32 [N, K], spelled out from the format's description."""
    stored, scale_name = reader.read(name), name.removesuffix("weight") + "scale"
    if scale_name not in reader.tensors:
        return stored.astype(np.float32)
    scale = reader.read(scale_name).astype(np.float32)
    if stored.dtype == np.int8:
        codes = stored.view(np.uint8)
        values = FP4_VALUES[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(len(codes), -1)
        return values * np.repeat(scale, 32, axis=1)
    rows, columns = (np.arange(size) // 128 for size in stored.shape)
    return stored.astype(np.float32) * scale[rows][:, columns]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp4", "partial blocks"])
def test_model_runs_on_it(name, tmp_path):
    config = with_layers(CONFIGS[name], 3)  # one layer of each kind
    model = checkpoints.load(synth(config, tmp_path / "out", seed=4), max_tokens=64)
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (1, 48)).astype(np.int32)
    logits = np.asarray(dsv4_jax.logits(model, tokens))
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std(axis=-1).min() and logits.std(axis=-1).max() < 3


def test_tensors_depend_on_seed_and_name_alone(tmp_path):
    one, cut = (ShardReader(synth(TINY, tmp_path / str(n), seed=5, shard_bytes=n)) for n in (1 << 30, 100_000))
    assert len(cut.files) > len(one.files) == 1
    digests = {name: one.read(name).tobytes() for name in one.tensors}
    assert digests == {name: cut.read(name).tobytes() for name in cut.tensors}
    experts = [digests[f"layers.{n}.ffn.experts.{e}.w1.weight"] for n in range(6) for e in range(8)]
    assert len(set(experts)) == len(experts)
    other = ShardReader(synth(TINY, tmp_path / "other", seed=6))
    assert not any(other.read(name).tobytes() == data for name, data in digests.items() if len(data) > 64)


def test_progress_counts_every_tensor(tmp_path):
    calls: list[tuple[int, int]] = []
    synth(TINY, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    total = len(official_tensors(ModelConfig.from_dict(TINY)))
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def stop(done: int, _: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth(TINY, tmp_path / "out", shard_bytes=10_000, progress=stop)
    assert not list(tmp_path.iterdir())


def test_existing_destination_is_kept_unless_forced(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists; .*force"):
        synth(TINY, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    assert ShardReader(synth(TINY, tmp_path, force=True)).tensors
    assert not (tmp_path / "mine.txt").exists()


def test_bad_config_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="hidden_size"):
        synth({k: v for k, v in TINY.items() if k != "hidden_size"}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers, hashed, ratios", [(1, 1, (0,)), (2, 2, (0, 4)), (5, 3, (0, 4, 128, 4, 128))])
def test_with_layers_keeps_the_first_layers_and_the_draft(layers, hashed, ratios):
    config = with_layers(TINY, layers)
    assert config["compress_ratios"] == [*ratios, 0]
    parsed = ModelConfig.from_dict(config)
    assert (parsed.compress_ratios, parsed.draft_ratios, parsed.num_hash_layers) == (ratios, (0,), hashed)
    whole, cut = official_tensors(ModelConfig.from_dict(TINY)), official_tensors(parsed)
    numbers = {name.split(".")[1] for name in cut if name.startswith("layers.")}
    assert numbers == {str(n) for n in range(layers)}
    assert cut == {name: whole[name] for name in cut}
    assert {n for n in whole if not n.startswith("layers.")} == {n for n in cut if not n.startswith("layers.")}


def test_with_layers_understands_other_spellings():
    kinds = ["sliding_attention", *["compressed_sparse_attention", "heavily_compressed_attention"] * 2]
    config = {k: v for k, v in TINY.items() if k not in ("num_hidden_layers", "num_hash_layers", "compress_ratios")}
    config |= {"n_layers": 5, "layer_types": kinds, "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 2}
    parsed = ModelConfig.from_dict(with_layers(config, 2))
    assert (parsed.num_hidden_layers, parsed.compress_ratios, parsed.num_hash_layers) == (2, (0, 4), 2)


@pytest.mark.parametrize("layers", [0, -1, 7])
def test_with_layers_refuses_what_the_config_lacks(layers):
    with pytest.raises(ValueError, match=f"layers={layers} must be between 1 and the config's 6"):
        with_layers(TINY, layers)
