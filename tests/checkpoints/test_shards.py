"""Our safetensors files against the format's own package, and malformed ones against errors that name the place."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
from golden_cases import case_name, golden_checkpoints
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.errors import CheckpointError
from checkpoints.shards import (
    DTYPES,
    INDEX,
    ShardReader,
    make_header,
    parse_header,
    read_header,
    write_checkpoint,
    write_shard,
)
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


@pytest.mark.parametrize("path", golden_checkpoints(), ids=case_name)
def test_a_header_and_its_tensors_give_back_the_file(path, tmp_path):
    reader = ShardReader(path)
    for file in reader.files:
        write_shard(tmp_path / file.name, reader.header_bytes(file), reader.read)
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_headers_are_padded_to_eight_bytes():
    for length in range(1, 17):
        header = make_header({"x" * length: ("F32", (1,))})
        assert len(header) % 8 == 0 and struct.unpack("<Q", header[:8])[0] == len(header) - 8


def test_tensors_need_not_be_aligned(tmp_path):
    """The format leaves the header's length free; a reader that maps bytes has to cope."""
    values = np.array([1.5, -2.0], np.float32)
    text = json.dumps({"a": entry()})
    for padding in range(8):
        reader = ShardReader(one_file(tmp_path, text.encode() + b" " * padding, values.tobytes()))
        np.testing.assert_array_equal(reader.read("a"), values)


def test_files_are_used_without_an_index_and_only_indexed_ones_with_it(tmp_path):
    for name in ("a", "b"):
        header = make_header({name: ("U8", (3,))})
        write_shard(tmp_path / f"{name}.safetensors", header, lambda n: np.full(3, ord(n), np.uint8))
    reader = ShardReader(tmp_path)
    assert [f.name for f in reader.files] == ["a.safetensors", "b.safetensors"]
    assert {n: reader.read(n).tolist() for n in reader.tensors} == {"a": [97] * 3, "b": [98] * 3}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": "b.safetensors"}}))
    assert list(ShardReader(tmp_path).tensors) == ["b"]


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    mebibyte = 1 << 20
    specs = {f"t{i}": ("U8", (mebibyte,)) for i in range(24)}
    tracemalloc.start()
    try:
        write_checkpoint(tmp_path, specs, lambda _: np.ones(mebibyte, np.uint8), shard_bytes=5 * mebibyte)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(ShardReader(tmp_path).files) == 5  # 4 of 5 tensors, 1 of 4
    assert peak < 4 * mebibyte


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
    "too many dimensions": ({"a": entry("U8", [1] * 65, (0, 1))}, bytes(1), None, "tensor a: .* 65 dimensions"),
    "absurd shape": ({"a": entry(shape=[2**62] * 60)}, bytes(8), None, "tensor a: shape .* larger than any array"),
    "empty, absurd": ({"a": entry(shape=(0, 2**62), offsets=(0, 0))}, b"", None, "tensor a: .* larger than any array"),
    "unprintable": (b'{"\\ud800": {}}', b"", None, r"tensor '\\ud800': .* unprintable"),
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


SMALL = make_header({"a": ("F32", (2, 3)), "b": ("I8", (5,)), "c": ("BF16", (0, 4))}) + bytes(29)


def test_every_truncation_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    for size in range(len(SMALL)):
        file.write_bytes(SMALL[:size])
        with pytest.raises(CheckpointError, match=f"model.safetensors: .*{size} bytes"):
            read_header(file)
    file.write_bytes(SMALL)
    assert [info.name for info in read_header(file)[1]] == ["a", "b", "c"]


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8"]),
        "shape": st.lists(st.integers(-1, 3), max_size=3),
        "data_offsets": st.tuples(st.integers(-1, 24), st.integers(0, 24)),
    }
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from("abc"), ENTRIES, max_size=3), st.booleans(), st.integers(0, 40))
def test_takes_exactly_what_the_package_takes(fields, tile, size):
    """Random headers, half of them with offsets made to fit: the same verdict, and the same tensors."""
    if tile:
        size = 0
        for fields_of_one in fields.values():
            nbytes = abs(int(np.prod(fields_of_one["shape"]))) * DTYPES[fields_of_one["dtype"]].itemsize
            fields_of_one["data_offsets"] = (size, size + nbytes)
            size += nbytes
    header = json.dumps(fields).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(size)
    try:
        want = {name: (t["dtype"], tuple(t["shape"])) for name, t in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        want = None
    try:
        got = {i.name: (i.dtype, i.shape) for i in parse_header(header, Path("x.safetensors"), len(content))}
    except CheckpointError:
        got = None
    assert got == want


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, len(SMALL) - 30), st.integers(0, 255))
def test_a_damaged_header_is_refused_or_still_reads(tmp_path_factory, place, byte):
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "model.safetensors").write_bytes(SMALL[:place] + bytes([byte]) + SMALL[place + 1 :])
    try:
        reader = ShardReader(directory)
    except CheckpointError as error:
        assert "model.safetensors" in str(error)
        return
    for name, info in reader.tensors.items():
        assert reader.read(name).shape == info.shape
    assert sum(info.nbytes for info in reader.tensors.values()) == 29


def test_a_tensor_in_two_files_is_refused(tmp_path):
    header = make_header({"a": ("U8", (1,))})
    for name in ("x", "y"):
        write_shard(tmp_path / f"{name}.safetensors", header, lambda _: np.zeros(1, np.uint8))
    with pytest.raises(CheckpointError, match="y.safetensors: tensor a is also in x.safetensors"):
        ShardReader(tmp_path)


def test_a_tensor_that_the_index_lacks_is_refused(tmp_path):
    one_file(tmp_path, {"a": entry(), "b": entry(offsets=(8, 16))}, bytes(16))
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor b is not in {INDEX}"):
        ShardReader(tmp_path)


def test_an_index_that_swaps_two_files_is_refused(tmp_path):
    specs = {"a": ("U8", (4,)), "b": ("U8", (4,))}
    write_checkpoint(tmp_path, specs, lambda _: np.zeros(4, np.uint8), shard_bytes=4)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] = dict(zip("ab", reversed(index["weight_map"].values()), strict=True))
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{INDEX}: tensor a is not in model-00002-of-00002.safetensors"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_directory_without_files_is_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=rf"{name}: no \*.safetensors files"):
        ShardReader(tmp_path / name)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no readable weight_map"),
        ('{"weight_map": {"a": 3}}', "no readable weight_map"),
        ('{"weight_map": {"\\ud800": "model.safetensors"}}', "no readable weight_map"),
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
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("array", [np.zeros(2, np.int32), np.zeros((2, 1), np.float32)], ids=["dtype", "shape"])
def test_arrays_that_do_not_fit_the_header_are_refused(array, tmp_path):
    header = make_header({"a": ("F32", (2,))})
    with pytest.raises(CheckpointError, match=r"tensor a is .*, its header says F32 \[2\]"):
        write_shard(tmp_path / "x.safetensors", header, lambda _: array)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path):
    file = tmp_path / "x.safetensors"
    header = make_header({"a": ("U8", (2,)), "b": ("U8", (2,))})
    write_shard(file, header, lambda _: np.ones(2, np.uint8))
    before = file.read_bytes()

    def fail_at_b(name: str) -> np.ndarray:
        if name == "b":
            raise OSError("no more")
        return np.zeros(2, np.uint8)

    with pytest.raises(OSError, match="no more"):
        write_shard(file, header, fail_at_b)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


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
