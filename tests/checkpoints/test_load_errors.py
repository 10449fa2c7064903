"""Whatever is wrong with a checkpoint or an argument: one error that names it and says what to do."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_cases import GOLDEN

import checkpoints
import dsv4_jax
from checkpoints import CheckpointError

CALM = GOLDEN / "calm" / "fp8"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
WQ_A, WKV = "layers.1.attn.wq_a.weight", "layers.1.attn.wkv.weight"

Tensor = tuple[str, list[int], bytes]  # dtype, shape, data
Shards = dict[str, dict[str, Tensor]]  # file -> name -> tensor


@pytest.fixture
def calm(tmp_path) -> Path:
    """An official checkpoint that a test may damage."""
    return shutil.copytree(CALM, tmp_path / "calm")


def read_shards(directory: Path) -> Shards:
    shards: Shards = {}
    for file in sorted(directory.glob("*.safetensors")):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        shards[file.name] = {}
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            shards[file.name][name] = (entry["dtype"], entry["shape"], content[begin:end])
    return shards


def write_shards(directory: Path, shards: Shards) -> None:
    """Write the files and an index that fits them."""
    weight_map = {}
    for file, tensors in shards.items():
        header: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape, data) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            end += len(data)
            weight_map[name] = file
        text = json.dumps(header).encode()
        data = b"".join(data for *_, data in tensors.values())
        (directory / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard_of(shards: Shards, name: str) -> str:
    return next(file for file, tensors in shards.items() if name in tensors)


def edit_config(directory: Path, **changes: Any) -> None:
    """Set fields of config.json; a value of `...` removes the field."""
    fields = json.loads((directory / "config.json").read_text()) | changes
    kept = {name: value for name, value in fields.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept))


def refused(path: Path, *parts: str) -> None:
    """load, convert and inspect all raise CheckpointError, in one line or two, with every part in the message."""
    out = path.parent / "out"
    for verb in (checkpoints.load, checkpoints.inspect, lambda p: checkpoints.convert(p, out)):
        with pytest.raises(CheckpointError) as raised:
            verb(path)
        message = str(raised.value)
        assert [part for part in parts if part not in message] == [], message
        assert len(message.splitlines()) <= 2, message
    assert not out.exists()


# --- shards ----------------------------------------------------------------------------------------------------------


def test_an_untouched_copy_loads(calm):
    """The ground under every test below: what they refuse is the damage, and rewriting shards does none."""
    write_shards(calm, read_shards(calm))
    model = checkpoints.load(calm, max_tokens=8)
    assert dsv4_jax.logits(model, np.zeros((1, 2), np.int32)).shape == (1, 2, 192)


def test_missing_shard(calm):
    (calm / SECOND).unlink()
    refused(calm, INDEX, f"shard {SECOND}", "missing", "download")


def test_missing_shard_without_an_index(calm):
    lost = sorted(read_shards(calm)[SECOND])
    (calm / SECOND).unlink()
    (calm / INDEX).unlink()
    refused(calm, str(calm), lost[0], f"and {len(lost) - 3} more", "missing", "download")


@pytest.mark.parametrize("kept", [0, 7, 100, -300_000, -1], ids=["empty", "length", "header", "data", "last-byte"])
def test_truncated_shard(calm, kept):
    content = (calm / SECOND).read_bytes()
    (calm / SECOND).write_bytes(content[:kept])
    refused(calm, SECOND, "truncated", "download it again")


def test_shard_with_trailing_bytes(calm):
    with open(calm / SECOND, "ab") as file:
        file.write(b"more")
    refused(calm, SECOND, "longer than its header says")


def test_shard_with_a_garbled_header(calm):
    content = bytearray((calm / FIRST).read_bytes())
    content[8:12] = b"\xff\xfe{{"
    (calm / FIRST).write_bytes(content)
    refused(calm, FIRST, "header is not valid JSON", "download it again")


def test_unreadable_index(calm):
    (calm / INDEX).write_text((calm / INDEX).read_text()[:1000])
    refused(calm, INDEX, "weight_map")


def test_index_that_points_outside(calm):
    (calm.parent / FIRST).write_bytes((calm / FIRST).read_bytes())
    (calm / INDEX).write_text((calm / INDEX).read_text().replace(FIRST, f"../{FIRST}"))
    refused(calm, INDEX, f"../{FIRST}", "not a plain file name")


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_missing_tensor(calm):
    shards = read_shards(calm)
    del shards[shard_of(shards, WKV)][WKV]
    write_shards(calm, shards)
    refused(calm, str(calm), f"tensor {WKV}", "missing", "download")


def test_tensor_that_only_the_index_has(calm):
    shards, index = read_shards(calm), (calm / INDEX).read_text()
    file = shard_of(shards, WKV)
    del shards[file][WKV]
    write_shards(calm, shards)
    (calm / INDEX).write_text(index)
    refused(calm, INDEX, f"tensor {WKV}", f"not in {file}", "download")


def test_tensor_that_the_index_has_not(calm):
    fields = json.loads((calm / INDEX).read_text())
    file = fields["weight_map"].pop(WKV)
    (calm / INDEX).write_text(json.dumps(fields))
    refused(calm, file, f"tensor {WKV}", f"not in {INDEX}")


@pytest.mark.parametrize("name", ["layers.0.attn.wq_a.scale", "layers.2.ffn.experts.3.w2.scale", "mtp.0.e_proj.scale"])
@pytest.mark.parametrize("flavour", ["fp8", "fp8base"])
def test_missing_scale(flavour, name, tmp_path):
    path = shutil.copytree(GOLDEN / "calm" / flavour, tmp_path / "calm")
    shards = read_shards(path)
    del shards[shard_of(shards, name)][name]
    write_shards(path, shards)
    refused(path, str(path), f"tensor {name}", "missing", "download")


@pytest.mark.parametrize("name", ["layers.1.attn.wq_c.weight", "layers.3.attn.wq_a.weight", "model.embed.weight"])
def test_unknown_tensor(calm, name):
    shards = read_shards(calm)
    shards[SECOND][name] = ("BF16", [2], bytes(4))
    write_shards(calm, shards)
    refused(calm, f"unknown tensor {name}", SECOND, "config.json and the shards are not of one model")


@pytest.mark.parametrize(
    "name",
    [WQ_A, "embed.weight", "layers.1.attn.attn_sink", "layers.2.ffn.experts.1.w3.weight", "layers.0.attn.wkv.scale"],
)
def test_wrong_shape(calm, name):
    shards = read_shards(calm)
    file = shard_of(shards, name)
    dtype, shape, data = shards[file][name]
    # The same bytes under another shape: only the shape can give it away.
    wrong = [1, *shape] if math.prod(shape) == 1 else [math.prod(shape)] if len(shape) > 1 else [*shape, 1]
    shards[file][name] = (dtype, wrong, data)
    write_shards(calm, shards)
    refused(calm, file, f"{name} is {dtype} {wrong}", f"config.json asks for {dtype} {shape}")


@pytest.mark.parametrize(
    "name, dtype",
    [
        (WQ_A, "I8"),
        ("layers.0.attn_norm.weight", "F16"),
        ("layers.1.attn.wq_a.scale", "U8"),
        ("layers.1.attn.attn_sink", "I32"),
        ("layers.0.ffn.gate.tid2eid", "F64"),
        ("layers.2.ffn.experts.1.w1.weight", "F8_E4M3"),
    ],
)
def test_wrong_dtype(calm, name, dtype):
    shards = read_shards(calm)
    file = shard_of(shards, name)
    right, shape, data = shards[file][name]
    shards[file][name] = (dtype, shape, data)
    write_shards(calm, shards)
    refused(calm, file, f"{name} is {dtype} {shape}", f"config.json asks for {right} {shape}")


def test_dtype_that_the_format_does_not_know(calm):
    shards = read_shards(calm)
    file = shard_of(shards, WQ_A)
    shards[file][WQ_A] = ("F3_E1M1", *shards[file][WQ_A][1:])
    write_shards(calm, shards)
    refused(calm, file, f"tensor {WQ_A}", "dtype 'F3_E1M1' is not supported", "F8_E4M3")


def test_one_tensor_in_two_shards(calm):
    shards = read_shards(calm)
    file = shard_of(shards, WKV)
    other = SECOND if file == FIRST else FIRST
    shards[other][WKV] = shards[file][WKV]
    write_shards(calm, shards)
    refused(calm, SECOND, f"tensor {WKV} is also in {FIRST}", "remove one")


@pytest.mark.parametrize("wrong", [4, -1, 1 << 32], ids=["too-large", "negative", "wraps-to-zero"])
def test_expert_id_out_of_range(calm, wrong):
    name = "layers.2.ffn.gate.tid2eid"
    shards = read_shards(calm)
    file = shard_of(shards, name)
    dtype, shape, data = shards[file][name]
    ids = np.frombuffer(data, np.int64).copy()
    ids[5] = wrong
    shards[file][name] = (dtype, shape, ids.tobytes())
    write_shards(calm, shards)
    for verb in (checkpoints.load, lambda p: checkpoints.convert(p, calm.parent / "out")):  # inspect reads no data
        with pytest.raises(CheckpointError, match=rf"{file}: {name} holds expert ids .*{wrong}.*config\.json has 4"):
            verb(calm)
    assert not (calm.parent / "out").exists()


@pytest.mark.parametrize(
    ("source", "name", "bad"),
    [
        (CALM, "layers.1.ffn.experts.2.w2.scale", b"\xff"),
        (CALM, "layers.0.attn.wkv.scale", b"\xff"),
        (CALM.with_name("fp8base"), "layers.1.attn.wq_a.scale", np.float32(np.nan).tobytes()),
        (CALM.with_name("fp8base"), "layers.1.ffn.experts.3.w1.scale", np.float32(-1).tobytes()),
    ],
)
def test_scale_that_is_no_number(tmp_path, source, name, bad):
    path = shutil.copytree(source, tmp_path / "damaged")
    shards = read_shards(path)
    file = shard_of(shards, name)
    dtype, shape, data = shards[file][name]
    shards[file][name] = (dtype, shape, data[: -len(bad)] + bad)
    write_shards(path, shards)
    with pytest.raises(CheckpointError, match=rf"{name} holds a scale that is not a number"):
        checkpoints.load(path, max_tokens=8)
    for use in (checkpoints.verify, lambda path: checkpoints.convert(path, tmp_path / "converted")):
        with pytest.raises(CheckpointError, match=rf"{name} has a block scale out of range"):
            use(path)
    assert not (tmp_path / "converted").exists()


def test_converted_scale_that_is_no_number(tmp_path):
    converted = checkpoints.convert(CALM, tmp_path / "converted")
    file = converted / "weights" / "layers.0.self_attn.kv_proj.scale" / "c" / "0" / "0"
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    with pytest.raises(CheckpointError, match="layers.0.attn.wkv.scale holds a scale that is not a number"):
        checkpoints.load(converted, max_tokens=8)


# --- config.json -----------------------------------------------------------------------------------------------------


def test_missing_config(calm):
    (calm / "config.json").unlink()
    refused(calm, "config.json: missing", "copy the model's config.json")


@pytest.mark.parametrize("field", ["hidden_size", "head_dim", "qk_rope_head_dim", "compress_ratios", "num_hash_layers"])
def test_missing_config_field(calm, field):
    edit_config(calm, **{field: ...})
    refused(calm, "config.json", field)


def test_unknown_config_field(calm):
    edit_config(calm, attention_chunks=3)
    refused(calm, "config.json", "unknown field(s) ['attention_chunks']")


@pytest.mark.parametrize("text", [b"", b'{"hidden_size": 128,', b"\xff\xfe\x00", b"[]", b"3"])
def test_config_that_is_not_a_json_object(calm, text):
    (calm / "config.json").write_bytes(text)
    refused(calm, "config.json", "JSON")


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", "128"),
        ("hidden_size", 128.5),
        ("hidden_size", True),
        ("vocab_size", float("nan")),
        ("vocab_size", float("inf")),
        ("rope_theta", float("nan")),
        ("num_hidden_layers", 0),
        ("sliding_window", -4),
        ("num_hash_layers", "3"),
        ("num_nextn_predict_layers", "1"),
        ("compress_ratios", 4),
        ("compress_ratios", [0, 4]),
        ("compress_ratios", [0, 4, "8", 0]),
        ("compress_ratios", [0, True, 8, 0]),
        ("rope_scaling", 16),
        ("rope_scaling", {"type": "yarn", "factor": "sixteen", "original_max_position_embeddings": 65536}),
        ("rope_scaling", {"type": "yarn", "factor": None, "original_max_position_embeddings": 65536}),
        ("quantization_config", "fp8"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": 128}),
        ("quantization_config", {"quant_method": "awq"}),
        ("expert_dtype", "fp3"),
        ("expert_dtype", ["fp4"]),
        ("o_groups", 3),
        ("num_experts_per_tok", 5),
        ("hidden_act", ["silu"]),
    ],
    ids=str,
)
def test_config_value_that_does_not_fit(calm, field, value):
    edit_config(calm, **{field: value})
    refused(calm, "config.json", field)


@pytest.mark.parametrize("flavour, stored, stated", [("fp8", "I8", "fp8"), ("fp8base", "F8_E4M3", "fp4")])
def test_expert_dtype_against_the_shards(flavour, stored, stated, tmp_path):
    path = shutil.copytree(GOLDEN / "calm" / flavour, tmp_path / "calm")
    edit_config(path, expert_dtype=stated)
    name = "layers.0.ffn.experts.0.w1.weight"
    file = shard_of(read_shards(path), name)
    refused(path, f"{file}: {name} is stored as {stored}", f"expert_dtype='{stated}'", "not of one release")


def test_unquantised_config_over_quantised_shards(calm):
    edit_config(calm, expert_dtype=..., quantization_config=...)
    refused(calm, "config.json", ".scale")


def test_v41_is_refused_with_a_sentence(calm):
    (calm / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": {"hidden_size": 5120}}))
    refused(calm, "config.json", "'deepseek_v41' is another architecture", "implements DeepSeek-V4")


# --- PATH ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [[], ["config.json"], ["config.json", "pytorch_model.bin"]], ids=str)
def test_path_that_is_neither_format(files, tmp_path):
    path = tmp_path / "odd"
    path.mkdir()
    for name in files:
        (path / name).write_text("{}")
    refused(path, str(path), "neither an official checkpoint", "*.safetensors", "`dsv4 convert`", "manifest.json")


def test_path_that_does_not_exist(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such directory", "give a checkpoint directory")


def test_path_that_is_a_file(calm):
    refused(calm / FIRST, f"{FIRST}: no such directory", "give a checkpoint directory")


# --- arguments of load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, value, says",
    [
        ("max_tokens", 0, r"max_tokens=0 must be .*between 1 and .*max_position_embeddings=1048576"),
        ("max_tokens", -8, r"max_tokens=-8 must be .*between 1 and"),
        ("max_tokens", 1048577, r"max_tokens=1048577 must be .*between 1 and"),
        ("max_tokens", 8.5, r"max_tokens=8\.5 must be"),
        ("max_tokens", "8", r"max_tokens='8' must be"),
        ("dtype", "float17", r"dtype='float17' is not a dtype; choose float32 or bfloat16"),
        ("dtype", "int8", r"dtype=int8 is not supported; choose float32 or bfloat16"),
        ("dtype", "float16", r"dtype=float16 is not supported; choose float32 or bfloat16"),
        ("cache_dtype", "int4", r"cache_dtype=int4 is not supported; choose float32 or bfloat16 or fp8"),
        ("kernels", "abacus", r"kernels='abacus' is not known; choose one of 'auto', 'xla'"),
        ("numerics", "precise", r"numerics='precise' is not known; choose 'auto' or one of \['exact', 'official'\]"),
    ],
)
def test_argument_that_does_not_fit(argument, value, says, monkeypatch):
    def untouched(*args):
        raise AssertionError("weights were read before the arguments were checked")

    monkeypatch.setattr("checkpoints.shards.ShardReader.read", untouched)
    with pytest.raises(ValueError, match=says):
        checkpoints.load(CALM, **{argument: value})


# --- DSpark ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dspark(calm) -> Path:
    """The calm model as a DSpark release has it: the same main tensors, three drafter stages for one MTP block."""
    edit_config(
        calm,
        dspark_block_size=5,
        dspark_noise_token_id=7,
        dspark_target_layer_ids=[0, 1, 2],
        dspark_markov_rank=16,
        compress_ratios=[0, 4, 8, 0, 0, 0],
    )
    shards = read_shards(calm)
    for file, tensors in shards.items():
        shards[file] = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    rng = np.random.default_rng(0)
    hidden, rank, vocab = 128, 16, 192
    for name, dtype, shape, itemsize in (
        ("mtp.0.main_proj.weight", "F8_E4M3", [hidden, 3 * hidden], 1),
        ("mtp.0.main_proj.scale", "F8_E8M0", [1, 3], 1),
        ("mtp.0.main_norm.weight", "BF16", [hidden], 2),
        ("mtp.1.attn.attn_sink", "F32", [2], 4),
        ("mtp.1.ffn.experts.0.w1.weight", "I8", [32, hidden // 2], 1),
        ("mtp.2.hc_head_scale", "F32", [1], 4),
        ("mtp.2.markov_head.markov_w1.weight", "BF16", [vocab, rank], 2),
        ("mtp.2.confidence_head.proj.weight", "BF16", [1, hidden + rank], 2),
    ):
        shards[SECOND][name] = (dtype, shape, rng.bytes(math.prod(shape) * itemsize))
    write_shards(calm, shards)
    return calm


def assert_generates_like_calm(load: Callable[[], dsv4_jax.DeepseekV4]) -> None:
    """A warning that says drafts are not used, and the golden continuation, which depends on the main tensors alone."""
    greedy = np.load(CALM.with_name("fp8.greedy.npz"))
    with pytest.warns(UserWarning, match="DSpark drafter is not used.*without drafts"):
        model = load()
    out = dsv4_jax.generate(model, greedy["prompt_ids"].astype(np.int32), max_new_tokens=16)
    assert np.asarray(out.tokens).tolist() == greedy["tokens"][:, :16].tolist()


@pytest.mark.slow
def test_dspark_generates_without_drafts(dspark):
    assert_generates_like_calm(lambda: checkpoints.load(dspark, max_tokens=64, numerics="exact"))


@pytest.mark.slow
def test_dspark_survives_convert_and_export(dspark):
    steps: list[tuple[int, int]] = []
    converted = checkpoints.convert(dspark, dspark.parent / "converted", progress=lambda *step: steps.append(step))
    assert_generates_like_calm(lambda: checkpoints.load(converted, max_tokens=64, numerics="exact"))
    assert steps[-1][0] == steps[-1][1], "progress ends at the total"

    exported = checkpoints.export(converted, dspark.parent / "exported")
    assert sorted(p.name for p in exported.iterdir()) == sorted(p.name for p in dspark.iterdir())
    for file in dspark.iterdir():
        assert (exported / file.name).read_bytes() == file.read_bytes(), file.name


def test_dspark_inspection_counts_the_drafter(dspark):
    tensors = [tensor for shard in read_shards(dspark).values() for tensor in shard.values()]
    for path in (dspark, checkpoints.convert(dspark, dspark.parent / "converted")):
        found = checkpoints.inspect(path)
        assert found.draft == "dspark"
        assert (found.tensors, found.bytes) == (len(tensors), sum(len(data) for *_, data in tensors))


@pytest.mark.filterwarnings("ignore:.*DSpark drafter:UserWarning")
def test_dspark_main_tensors_are_still_checked(dspark):
    shards = read_shards(dspark)
    del shards[shard_of(shards, WKV)][WKV]
    write_shards(dspark, shards)
    refused(dspark, f"tensor {WKV}", "missing", "download")


def test_plain_release_without_its_mtp_block_is_refused(calm):
    """Only a DSpark config excuses missing MTP tensors."""
    shards = read_shards(calm)
    for file, tensors in shards.items():
        shards[file] = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    write_shards(calm, shards)
    refused(calm, "tensors mtp.0.", "missing", "download")
