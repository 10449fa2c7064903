"""Bad sources and bad destinations: conversion says what is wrong and what to do, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden_cases import GOLDEN

import checkpoints
from checkpoints import CheckpointError
from checkpoints.shards import INDEX

ROOT = Path(__file__).parents[2]
CALM = GOLDEN / "calm" / "fp8"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture
def source(tmp_path) -> Path:
    return shutil.copytree(CALM, tmp_path / "source")


def header_of(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def write(file: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def truncated(source: Path) -> None:
    content = (source / FIRST).read_bytes()
    (source / FIRST).write_bytes(content[: len(content) * 2 // 3])


def index_names_a_missing_shard(source: Path) -> None:
    (source / SECOND).unlink()


def one_tensor_in_two_shards(source: Path) -> None:
    name = next(name for name in header_of(source / FIRST)[0] if name != "__metadata__")
    header, data = header_of(source / SECOND)
    header[name] = {"dtype": "U8", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    write(source / SECOND, header, data + b"abc")


def wrong_dtype(source: Path) -> None:
    header, data = header_of(source / FIRST)
    header["embed.weight"]["dtype"] = "F16"
    write(source / FIRST, header, data)


def scale_out_of_range(source: Path) -> None:
    header, data = header_of(source / FIRST)
    begin, _ = header["layers.0.attn.wkv.scale"]["data_offsets"]
    write(source / FIRST, header, data[:begin] + b"\xf7" + data[begin + 1 :])


def no_config(source: Path) -> None:
    (source / "config.json").unlink()


def a_name_of_ours(source: Path) -> None:
    (source / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    "damage, says",
    [
        (truncated, rf"{FIRST}: \d+ bytes where its header asks for \d+; truncated; download it again"),
        (index_names_a_missing_shard, rf"names shard {SECOND}, which is missing; download it"),
        (one_tensor_in_two_shards, rf"{SECOND}: tensor .* is also in {FIRST}; remove one"),
        (wrong_dtype, rf"{FIRST}: embed\.weight is F16 .*; config\.json asks for BF16"),
        (
            scale_out_of_range,
            r"layers\.0\.attn\.wkv\.scale has a block scale out of range \(byte 247 at \[0, 0\].*again",
        ),
        (no_config, r"config\.json: missing; copy"),
        (a_name_of_ours, r"source.manifest\.json: has a name that a converted checkpoint needs; rename"),
    ],
)
def test_bad_source(damage, says, source, tmp_path):
    damage(source)
    before = files_of(source)
    with pytest.raises(CheckpointError, match=says):
        checkpoints.convert(source, tmp_path / "out")
    assert files_of(source) == before and not (tmp_path / "out").exists()


def test_repaired_source_is_finished_from_where_it_stood(source, tmp_path):
    sound = (source / FIRST).read_bytes()
    scale_out_of_range(source)
    with pytest.raises(CheckpointError, match="out of range"):
        checkpoints.convert(source, tmp_path / "out")
    (source / FIRST).write_bytes(sound)
    checkpoints.convert(source, tmp_path / "out")
    checkpoints.verify(tmp_path / "out", CALM)


def test_flipped_byte_in_a_header(source, tmp_path):
    """Any byte of an entry: a name, a dtype, a digit, a bracket."""
    rng, content = random.Random(0), (source / FIRST).read_bytes()
    start = content.index(b'"embed.weight"')
    end = 8 + int.from_bytes(content[:8], "little")
    end = start + len(content[start:end].rstrip(b" }"))
    for position in rng.sample(range(start, end), 60):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        (source / FIRST).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=rf"{FIRST}|{INDEX}|source: tensor"):
            checkpoints.plan(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("destination", ["/proc/converted", "/dev/null/converted"])
def test_destination_that_cannot_be_written(destination):
    with pytest.raises(CheckpointError, match=f"{destination}: cannot be written"):
        checkpoints.convert(CALM, destination)


def test_unrelated_destination_is_kept(tmp_path):
    for name, make in {"directory": Path.mkdir, "file": Path.touch, "link": lambda p: p.symlink_to("nowhere")}.items():
        make(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: exists; .*force"):
            checkpoints.convert(CALM, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "file", "link"]
    assert (tmp_path / "link").is_symlink()
    for name in ("directory", "file", "link"):
        checkpoints.convert(CALM, tmp_path / name, force=True)
        checkpoints.verify(tmp_path / name, CALM)


def test_too_little_space_is_found_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12 << 20))
    with pytest.raises(CheckpointError, match=r"out: needs 0\.02 GiB of disk, 0\.01 GiB are free; make room"):
        checkpoints.convert(CALM, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys, checkpoints
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
checkpoints.convert(sys.argv[1], sys.argv[2])
"""


def test_disk_that_fills_up(tmp_path):
    """By a limit on file sizes, which makes writes fail as a full disk does; then without it."""
    script = [sys.executable, "-c", LIMITED, CALM, tmp_path / "out", 20_000]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, env=env, timeout=300)
    assert "out: disk full (File too large); finished files are kept, make room and run the same command" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.journal", ".out.partial"]
    finished = [json.loads(line)["file"] for line in (tmp_path / ".out.journal").read_text().splitlines()]
    assert finished
    stamps = {name: (tmp_path / ".out.partial" / name).stat().st_mtime_ns for name in finished}
    checkpoints.convert(CALM, tmp_path / "out")
    assert stamps == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    checkpoints.verify(tmp_path / "out", CALM)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB; mounting one takes rights that not every machine gives."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here; test_disk_that_fills_up stands in")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_full_file_system(small_disk, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"out: needs .* GiB of disk, 0\.00 GiB are free"):
        checkpoints.convert(CALM, small_disk / "out")
    assert list(small_disk.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))  # filled while we write
    with pytest.raises(CheckpointError, match=r"out: disk full \(No space left on device\); finished files are kept"):
        checkpoints.convert(CALM, small_disk / "out")
    assert not (small_disk / "out").exists() and (small_disk / ".out.journal").stat().st_size
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    checkpoints.convert(CALM, small_disk / "out")
    checkpoints.verify(small_disk / "out", CALM)


def damaged_tiles(converted: Path) -> Path:
    return flip(max((converted / "weights").glob("*/c/**/0"), key=lambda p: p.stat().st_size if p.is_file() else 0))


def damaged_array_description(converted: Path) -> Path:
    return flip(converted / "weights" / "lm_head" / "zarr.json")


def damaged_config(converted: Path) -> Path:
    file = converted / "config.json"
    file.write_text(file.read_text() + " ")
    return file


def missing_header(converted: Path) -> Path:
    file = converted / "originals" / f"{FIRST}.header"
    file.unlink()
    return file


def stranger(converted: Path) -> Path:
    file = converted / "weights" / "lm_head" / "c" / "9"
    file.write_text("")
    return file


def flip(file: Path) -> Path:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    "damage, says",
    [
        (damaged_tiles, "not what was written"),
        (damaged_array_description, "not what was written"),
        (damaged_config, "not what was written"),
        (missing_header, "missing"),
        (stranger, "not in manifest.json; remove it"),
    ],
)
def test_verify_finds(damage: Callable[[Path], Path], says, tmp_path):
    converted = checkpoints.convert(CALM, tmp_path / "converted")
    assert checkpoints.verify(converted).tensors == checkpoints.verify(CALM).tensors == 243
    file = damage(converted)
    with pytest.raises(checkpoints.VerificationError) as caught:
        checkpoints.verify(converted)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{file}: ") and says in caught.value.problems[0]


def test_verify_against_another(source, tmp_path):
    converted = checkpoints.convert(CALM, tmp_path / "converted")
    found = checkpoints.verify(converted, CALM)
    assert (found.against, found.tensors) == (str(CALM), 243)
    assert checkpoints.verify(CALM, converted).tensors == 243  # either way round
    header, data = header_of(source / SECOND)
    names = ["layers.2.ffn.experts.1.w3.weight", "layers.1.ffn.gate.tid2eid", "norm.weight"]
    names = [name for name in names if name in header] or [name for name in header if name != "__metadata__"][:2]
    for name in names:
        begin, end = header[name]["data_offsets"]
        data = data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :]
    write(source / SECOND, header, data)
    with pytest.raises(checkpoints.VerificationError) as caught:
        checkpoints.verify(converted, source)
    assert sorted(caught.value.problems) == sorted(f"{converted}: {name} differs from {source}" for name in names)
    with pytest.raises(checkpoints.VerificationError, match=r"is .* in .*tiny|has .*, .* has not"):
        checkpoints.verify(converted, GOLDEN / "tiny" / "fp8")


def test_verify_reports_progress_to_the_end(tmp_path):
    steps: list[tuple[int, int]] = []
    found = checkpoints.verify(CALM, progress=lambda *step: steps.append(step))
    assert steps == sorted(steps) and steps[-1] == (found.bytes, found.bytes)
