"""inspect: its totals are those of the files, whichever form the checkpoint is in."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from pathlib import Path

import pytest
import safetensors
from golden_cases import GOLDEN, case_name, golden_checkpoints

import checkpoints
from checkpoints import CheckpointError

every_golden = pytest.mark.parametrize("path", golden_checkpoints(), ids=case_name)


def headers(path: Path) -> dict[str, tuple[str, list[int], int]]:
    """Name -> (dtype, shape, bytes) by the safetensors package."""
    return {
        name: (tensor["dtype"], tensor["shape"], len(tensor["data"]))
        for file in path.glob("*.safetensors")
        for name, tensor in safetensors.deserialize(file.read_bytes())
    }


def parameters(tensors: dict[str, tuple[str, list[int], int]]) -> int:
    """Weights: no scales beside a weight, no lookup table, two fp4 codes in a byte."""
    return sum(
        math.prod(shape) * (2 if dtype == "I8" else 1)
        for name, (dtype, shape, _) in tensors.items()
        if not name.endswith((".scale", ".tid2eid"))
    )


@every_golden
def test_totals_are_those_of_the_headers(path):
    tensors = headers(path)
    found = checkpoints.inspect(path)

    assert found.format == "official" and found.path == str(path) and found.draft == "mtp"
    assert found.tensors == len(tensors)
    assert found.bytes == sum(nbytes for *_, nbytes in tensors.values())
    assert found.parameters == parameters(tensors)
    assert found.files == len(list(path.glob("*.safetensors")))
    assert found.config == json.loads((path / "config.json").read_text())

    by_dtype: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for dtype, _, nbytes in tensors.values():
        by_dtype[dtype]["tensors"] += 1
        by_dtype[dtype]["bytes"] += nbytes
    assert found.by_dtype == dict(by_dtype)


@every_golden
def test_parts_are_counted_where_they_belong(path):
    tensors = headers(path)
    found = checkpoints.inspect(path)
    owners = {  # a part -> which official names it holds
        "MTP": lambda n: n.startswith("mtp."),
        "routed experts": lambda n: ".ffn.experts." in n and n.startswith("layers."),
        "shared expert": lambda n: ".shared_experts." in n and n.startswith("layers."),
        "router": lambda n: ".ffn.gate." in n and n.startswith("layers."),
        "indexer": lambda n: ".indexer." in n,
        "embedding": lambda n: n == "embed.weight",
        "LM head": lambda n: n == "head.weight",
        "hyper-connections": lambda n: ".hc_" in n and n.startswith("layers.") or n.startswith("hc_head"),
    }
    for part, owns in owners.items():
        own = {name: tensor for name, tensor in tensors.items() if owns(name)}
        assert own, part
        assert found.by_part[part]["bytes"] == sum(nbytes for *_, nbytes in own.values()), part
        assert found.by_part[part]["parameters"] == parameters(own), part
    assert sum(part["bytes"] for part in found.by_part.values()) == found.bytes
    assert sum(part["parameters"] for part in found.by_part.values()) == found.parameters


@every_golden
def test_converted_says_the_same(path, tmp_path):
    converted = checkpoints.convert(path, tmp_path / "converted")
    official, ours = checkpoints.inspect(path), checkpoints.inspect(converted)

    assert (ours.format, ours.path) == ("converted", str(converted))
    assert ours.files == sum(file.is_file() for file in (converted / "weights").rglob("*"))
    assert dataclasses.replace(ours, format=official.format, path=official.path, files=official.files) == official


@every_golden
def test_json_round_trip(path):
    found = checkpoints.inspect(path)
    assert json.loads(json.dumps(found.to_json())) == dataclasses.asdict(found)


def test_model_line():
    line = checkpoints.inspect(GOLDEN / "tiny" / "fp8").model
    for fact in ("6 layers", "2 sliding", "2 CSA", "2 HCA", "fp4"):
        assert fact in line, line


def test_a_shard_of_another_model_is_refused(tmp_path):
    for file in (GOLDEN / "calm" / "fp8").iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 200}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"embed\.weight is BF16 \[192, 128\]; config\.json asks for .*\[200, "):
        checkpoints.inspect(tmp_path)


def test_cache_sizes_are_those_of_the_config():
    cache = checkpoints.inspect(GOLDEN / "tiny" / "fp8").cache
    narrow, wide = cache["fp8, index keys fp4"], cache["bfloat16"]
    assert 0 < narrow["per_token"] < wide["per_token"] and 0 < narrow["fixed"] < wide["fixed"]
    assert sum(narrow["per_token_of_one_layer"].values()) < narrow["per_token"]  # tiny has two layers of each kind
