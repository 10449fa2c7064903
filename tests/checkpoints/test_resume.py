"""Interrupted conversions: killed anywhere and run again, the result is the same and finished work is kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden_cases import GOLDEN

import checkpoints
from checkpoints import CheckpointError
from checkpoints.journal import Journal

ROOT = Path(__file__).parents[2]
CALM = GOLDEN / "calm" / "fp8"
converter = sys.modules["checkpoints.convert"]  # the package has a function of that name
FULL = bool(os.environ.get("DSV4_FULL_TESTS"))


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, bytes]:
    return files_of(checkpoints.convert(CALM, tmp_path_factory.mktemp("reference") / "converted"))


@pytest.mark.slow
def test_killed_anywhere_and_run_again(tmp_path):
    """20 random points and more with DSV4_FULL_TESTS=1, 6 without; each file in several bands, three at a time."""
    points, seed = (40, int(time.time())) if FULL else (6, 0)
    script = [sys.executable, ROOT / "tests" / "support" / "kill_points.py", CALM, tmp_path, points, seed, 2048]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, timeout=1800, env=env)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    found = json.loads(done.stdout)
    print(found)
    assert found["killed"] >= points - 2 and found["files_kept"] > points * 10


class Interrupt(Exception):
    pass


def stop_after(bands: int):
    """A progress function that fails after so many bands."""
    count = 0

    def progress(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count > bands:
            raise Interrupt

    return progress


def interrupted(destination: Path, bands: int = 60, source: Path = CALM) -> tuple[Path, Path]:
    """A conversion that failed on its way; its unfinished directory and its journal."""
    with pytest.raises(Interrupt):
        checkpoints.convert(source, destination, progress=stop_after(bands), workers=1)
    assert not destination.exists()
    return destination.with_name(f".{destination.name}.partial"), destination.with_name(f".{destination.name}.journal")


def test_an_error_on_the_way_keeps_what_is_finished(tmp_path, reference):
    work, journal = interrupted(tmp_path / "out")
    finished = [json.loads(line)["file"] for line in journal.read_text().splitlines()]
    assert 30 < len(finished) <= 60 and all((work / name).read_bytes() == reference[name] for name in finished)
    steps: list[tuple[int, int]] = []
    checkpoints.convert(CALM, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert files_of(tmp_path / "out") == reference
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_a_finished_file_that_changed_is_written_again(damage, tmp_path, reference):
    work, journal = interrupted(tmp_path / "out")
    name = max((json.loads(line)["file"] for line in journal.read_text().splitlines()), key=lambda n: len(reference[n]))
    content = bytearray((work / name).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        (work / name).unlink()
    else:
        (work / name).write_bytes(content if damage == "flipped" else content[:-1])
    checkpoints.convert(CALM, tmp_path / "out")
    assert files_of(tmp_path / "out") == reference


@pytest.mark.parametrize("tail", [b"", b'{"file": "weights/lm_h', b"\x00\xff\n", b'{"file": 3}\n[]\n"x"\n'])
def test_a_torn_journal_counts_as_far_as_it_reads(tail, tmp_path, reference):
    _, journal = interrupted(tmp_path / "out")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]) + tail)
    checkpoints.convert(CALM, tmp_path / "out")
    assert files_of(tmp_path / "out") == reference


def test_files_of_a_shard_that_changed_are_written_again(tmp_path):
    source = shutil.copytree(CALM, tmp_path / "source")
    _, journal = interrupted(tmp_path / "out", source=source)
    assert journal.read_text()
    for shard in source.glob("*.safetensors"):  # another scale everywhere, same header, same size
        content = bytearray(shard.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name.endswith(".scale"):
                begin, end = (start + offset for offset in entry["data_offsets"])
                content[begin:end] = bytes([120]) * (end - begin)
        shard.write_bytes(content)
    checkpoints.convert(source, tmp_path / "out")
    checkpoints.verify(tmp_path / "out", source)


def test_a_finished_conversion_is_left_alone(tmp_path):
    converted = checkpoints.convert(CALM, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in converted.rglob("*")}
    (tmp_path / ".out.journal").write_text("")  # as if killed right after the rename
    (tmp_path / ".out.replaced").mkdir()
    assert checkpoints.convert(CALM, converted) == converted
    assert before == {p: p.stat().st_mtime_ns for p in converted.rglob("*")}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="out: exists; .*force"):
        checkpoints.convert(GOLDEN / "tiny" / "fp8", converted)


def test_an_unfinished_directory_never_loads(tmp_path, reference):
    work, _ = interrupted(tmp_path / "out")
    for name, content in reference.items():  # even with everything in place
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content)
    for use in (checkpoints.load, checkpoints.inspect, checkpoints.verify):
        with pytest.raises(CheckpointError, match=r"\.out\.partial: an unfinished conversion; run the same"):
            use(work)


def test_two_at_a_time_are_refused(tmp_path, reference):
    work, journal = interrupted(tmp_path / "out")
    first = Journal(journal)
    with pytest.raises(CheckpointError, match=r"\.out\.journal: another process is converting"):
        checkpoints.convert(CALM, tmp_path / "out")
    first.close()
    checkpoints.convert(CALM, tmp_path / "out")
    assert files_of(tmp_path / "out") == reference


def test_a_directory_in_the_way_is_not_ours(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match=r"\.out\.partial: is in the way, .*remove it"):
        checkpoints.convert(CALM, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "mine.txt").read_text() == "keep"


def test_what_an_older_run_left_is_swept_out(tmp_path, reference):
    work, _ = interrupted(tmp_path / "out")
    (work / "weights" / "stranger" / "c").mkdir(parents=True)
    (work / "weights" / "stranger" / "c" / "0").write_text("from another layout")
    (work / "weights" / "lm_head" / "c").mkdir(parents=True, exist_ok=True)
    (work / "weights" / "lm_head" / "c" / "7.partial").write_text("half")
    checkpoints.convert(CALM, tmp_path / "out")
    assert files_of(tmp_path / "out") == reference


def test_memory_and_workers(tmp_path):
    with pytest.raises(CheckpointError, match=r"max_memory=1000 is too little: .* needs \d+ MiB at least"):
        checkpoints.convert(CALM, tmp_path / "out", max_memory=1000)
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        checkpoints.convert(CALM, tmp_path / "out", workers=0)
    assert list(tmp_path.iterdir()) == []
    planned = checkpoints.plan(CALM, tmp_path / "out")
    for megabytes, workers in [(1, 1), (64, 2), (512, 4), (4096, 8)]:
        count, band = converter._share_memory(planned, megabytes << 20, workers)
        assert 1 <= count <= workers and 3 * count * band <= megabytes << 20


def test_plan_is_what_is_written(tmp_path, reference):
    planned = checkpoints.plan(CALM, tmp_path / "below" / "out")
    assert list(tmp_path.iterdir()) == []
    sizes = {file.name: file.layout.file_bytes for file in planned.files}
    tiles = re.compile(r"weights/[^/]+/c(/\d+)*")
    assert sizes == {name: len(content) for name, content in reference.items() if tiles.fullmatch(name)}
    described = planned.to_json()
    manifest = json.loads(reference["manifest.json"])
    forms = {path: {key: leaf[key] for key in ("dtype", "shape")} for path, leaf in described["leaves"].items()}
    assert forms == manifest["leaves"] and described["fits"]
    assert described["files"] == len(sizes) and sum(leaf["files"] for leaf in described["leaves"].values()) == len(
        sizes
    )
    interrupted(tmp_path / "out")
    assert checkpoints.plan(CALM, tmp_path / "out").disk_bytes < planned.disk_bytes
