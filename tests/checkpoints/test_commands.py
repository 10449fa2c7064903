"""convert, verify and export as commands: their options, their reports, their exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_cases import GOLDEN

import checkpoints
from checkpoints.memory import anonymous_bytes
from dsv4_jax import cli

CALM = GOLDEN / "calm" / "fp8"


@pytest.fixture
def dsv4(capsys):
    """Run a command in process: (exit status, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        status = cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return status, captured.out, " ".join(captured.err.split())

    return run


def test_dry_run_writes_nothing_and_tells_all(dsv4, tmp_path):
    status, out, _ = dsv4("convert", CALM, tmp_path / "out", "--dry-run", "--json")
    found = json.loads(out)
    assert status == 0 and list(tmp_path.iterdir()) == []
    experts = found["leaves"]["layers.1.mlp.experts.gate_up_proj.data"]
    assert experts == {"dtype": "uint8", "shape": [4, 2, 32, 64], "bytes": 16384, "files": 1, "splits": [4, 2, 1, 1]}
    assert found["bytes"] == sum(leaf["bytes"] for leaf in found["leaves"].values()) < found["disk_bytes"]
    status, out, _ = dsv4("convert", CALM, tmp_path / "out", "--dry-run")
    assert status == 0 and "155 arrays, 155 files" in out and list(tmp_path.iterdir()) == []


def test_dry_run_fails_where_the_disk_is_too_small(dsv4, tmp_path, monkeypatch):
    whole = checkpoints.plan(CALM, tmp_path / "out")
    monkeypatch.setattr(checkpoints, "plan", lambda src, dst: checkpoints.Plan(**vars(whole) | {"disk_free": 5}))
    status, out, err = dsv4("convert", CALM, tmp_path / "out", "--dry-run", "--json")
    assert status == 1 and not json.loads(out)["fits"] and "needs 17" in err and "5.0 B are free" in err


def test_convert_reports_its_peak_memory(dsv4, tmp_path):
    before = anonymous_bytes()
    options = ("--workers", 2, "--max-memory", "512MiB", "--json")
    status, out, _ = dsv4("convert", CALM, tmp_path / "out", *options)
    assert status == 0
    assert 0.5 * before < json.loads(out)["peak_memory_bytes"] < before + (1 << 30)


@pytest.mark.parametrize(
    "options, says",
    [
        (("--max-memory", "plenty"), "--max-memory plenty: not a size; write 2GiB, 512MiB"),
        (("--max-memory", "5KB"), "max_memory=5000 is too little: this conversion needs"),
        (("--workers", 0), "workers=0 must be at least 1"),
    ],
)
def test_bad_options(options, says, dsv4, tmp_path):
    status, out, err = dsv4("convert", CALM, tmp_path / "out", *options)
    assert (status, out) == (1, "") and says in err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, size",
    [
        ("0", 0),
        ("4096", 4096),
        ("2GiB", 2 << 30),
        ("2g", 2 << 30),
        ("1.5 MiB", 3 << 19),
        ("3kB", 3000),
        ("1TB", 10**12),
    ],
)
def test_sizes(text, size):
    assert cli._bytes(text, "--max-memory") == size


def test_verify(dsv4, tmp_path):
    converted = checkpoints.convert(CALM, tmp_path / "out")
    status, out, _ = dsv4("verify", converted, "--against", CALM, "--workers", 2, "--json")
    assert status == 0 and json.loads(out) == checkpoints.verify(converted, CALM).to_json() | {"ok": True}
    for name in ("lm_head", "embed_tokens"):
        file = converted / "weights" / name / "c" / "0" / "0"
        file.write_bytes(b"\x01\x02" + file.read_bytes()[2:])
    status, out, err = dsv4("verify", converted, "--json")
    found = json.loads(out)
    assert status == 1 and not found["ok"] and len(found["problems"]) == 2
    assert "SHA-256 differs" in err and "(and 1 more)" in err and "Traceback" not in err
    status, out, _ = dsv4("verify", converted)
    assert status == 1 and out.splitlines() == found["problems"]


def test_export_gives_back_the_files(dsv4, tmp_path):
    converted = checkpoints.convert(CALM, tmp_path / "out")
    steps: list[tuple[int, int]] = []
    checkpoints.export(converted, tmp_path / "again", progress=lambda *step: steps.append(step))
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    status, out, _ = dsv4("export", converted, tmp_path / "back", "--json")
    assert status == 0 and Path(json.loads(out)["written"]) == tmp_path / "back"
    for file in CALM.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
