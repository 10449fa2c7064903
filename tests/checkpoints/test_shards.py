"""Our safetensors files against the format's own package, and malformed ones against errors that name the place."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
from golden_cases import case_name, golden_checkpoints
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.errors import CheckpointError
from checkpoints.shards import DTYPES, INDEX, ShardReader, make_header, parse_header, write_checkpoint, write_shard
from checkpoints.source import open_source
from checkpoints.synth import official_tensors, synth
from dsv4_jax.config import ModelConfig
from dsv4_jax.presets import PRESETS


def reference(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    entries = safetensors.deserialize(file.read_bytes())
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in entries}


@pytest.mark.parametrize("path", golden_checkpoints(), ids=case_name)
def test_reads_what_the_package_reads(path):
    reader = ShardReader(path)
    want = {name: entry for file in reader.files for name, entry in reference(file).items()}
    assert set(reader.tensors) == set(want)
    for name, (dtype, shape, data) in want.items():
        array = reader.read(name)
        assert (reader.tensors[name].dtype, array.shape, array.tobytes()) == (dtype, shape, data)
        assert not array.flags.writeable


def test_the_package_reads_what_we_write(tmp_path):
    rng = np.random.default_rng(0)
    specs = {f"{dtype}.{i}": (dtype, shape) for i, shape in enumerate([(), (0, 3), (5, 7)]) for dtype in DTYPES}
    raw = {n: rng.integers(0, 2, int(np.prod(s)) * DTYPES[d].itemsize, np.uint8) for n, (d, s) in specs.items()}
    arrays = {n: raw[n].view(DTYPES[d]).reshape(s) for n, (d, s) in specs.items()}
    write_checkpoint(tmp_path, specs, arrays.__getitem__, shard_bytes=200)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    found = {name: entry for file in files for name, entry in reference(file).items()}
    assert found == {n: (d, tuple(s), arrays[n].tobytes()) for n, (d, s) in specs.items()}
    total = json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(a.nbytes for a in arrays.values())


def one_file(tmp_path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (tmp_path / "model.safetensors").write_bytes(prefix + text + data)
    return tmp_path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


MALFORMED = {
    "empty file": (b"", b"", 5, "truncated or not a safetensors file"),
    "huge header": ({}, b"", 1 << 60, "truncated or not a safetensors file"),
    "not JSON": (b"{", b"", None, "not valid JSON"),
    "deep JSON": (b"[" * 100_000, b"", None, "not valid JSON"),
    "not an object": (b"[]", b"", None, "not a JSON object"),
    "tensor twice": (b'{"a":{},"a":{}}', b"", None, "a key appears twice"),
    "unknown dtype": ({"a": entry("F7")}, bytes(8), None, "tensor a: dtype 'F7' is not supported"),
    "bad shape": ({"a": entry(shape=(-2,))}, bytes(8), None, "tensor a: shape"),
    "bool shape": ({"a": entry(shape=(True,))}, bytes(8), None, "tensor a: shape"),
    "missing field": ({"a": {"dtype": "F32"}}, b"", None, "tensor a: its entry must have exactly"),
    "wrong size": ({"a": entry(shape=(3,))}, bytes(8), None, "tensor a: F32 .* needs 12 bytes"),
    "gap": ({"a": entry(offsets=(4, 12))}, bytes(12), None, "tensor a starts at byte"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None, "tensor b starts at byte"),
    "truncated": ({"a": entry()}, bytes(7), None, "truncated; download it again"),
    "trailing bytes": ({"a": entry()}, bytes(9), None, "longer than its header says"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused(name, tmp_path):
    header, data, length, message = MALFORMED[name]
    with pytest.raises(CheckpointError, match=message) as error:
        ShardReader(one_file(tmp_path, header, data, length))
    assert "model.safetensors" in str(error.value)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_header_is_read_or_refused(header, size):
    try:
        parse_header(header, Path("x.safetensors"), size)
    except CheckpointError:
        return
    assert isinstance(json.loads(header), dict)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no readable weight_map"),
        ('{"weight_map": {"a": 3}}', "no readable weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "not a plain file name"),
        ('{"weight_map": {"a": "other.safetensors"}}', "names shard other.safetensors, which is missing"),
        (
            '{"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}',
            "tensor b is not in model.safetensors",
        ),
    ],
)
def test_index_that_does_not_fit_is_refused(index, message, tmp_path):
    one_file(tmp_path, {"a": entry()}, bytes(8))
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        ShardReader(tmp_path)


def test_a_failed_write_leaves_no_file(tmp_path):
    header = make_header({"a": ("F32", (2,))})
    with pytest.raises(CheckpointError, match="tensor a has 4 bytes, its header says 8"):
        write_shard(tmp_path / "x.safetensors", header, lambda _: np.zeros(1, np.float32))
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("path", golden_checkpoints(), ids=case_name)
def test_the_name_table_lists_a_checkpoints_tensors(path):
    tensors = ShardReader(path).tensors
    assert official_tensors(open_source(path).config) == {n: (t.dtype, t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("flash", 69_187, 159_609_485_896),
        ("pro", 145_116, 864_704_792_696),
        ("flash-base", 69_187, 292_555_345_480),
        ("pro-base", 145_116, 1_602_325_824_632),
    ],
)
def test_totals_of_the_published_checkpoints(name, count, size):
    tensors = official_tensors(ModelConfig.from_dict(PRESETS[name]))
    assert len(tensors) == count
    assert sum(int(np.prod(shape)) * DTYPES[dtype].itemsize for dtype, shape in tensors.values()) == size


def test_synthetic_checkpoints_repeat_by_seed(tmp_path):
    paths = [synth(PRESETS["tiny"], tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))]
    first, again, other = ((p / "model-00001-of-00001.safetensors").read_bytes() for p in paths)
    assert first == again and first != other
