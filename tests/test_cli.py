"""The `dsv4` command as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def dsv4(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dsv4_jax.cli", *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=300)


def ok(*args: object) -> subprocess.CompletedProcess:
    done = dsv4(*args)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("command", ["convert", "export", "inspect", "synth", "generate"])
def test_help_has_an_example(command):
    out = ok(command, "--help").stdout
    assert "xample" in out and f"dsv4 {command}" in out


def test_bundled_checkpoint_generates_text_the_same_each_time():
    args = ("generate", "--prompt", "The first minute", "--max-new-tokens", 12, "--json", "--stop", 2)
    first, again = (json.loads(ok(*args).stdout) for _ in range(2))
    assert first["tokens"] == again["tokens"] and first["text"] == again["text"]
    assert len(first["tokens"]) == 1 and 1 <= len(first["tokens"][0]) <= 12
    assert first["stats"]["new_tokens"] == len(first["tokens"][0])


def test_streamed_text_is_the_generated_text():
    args = (
        "generate",
        "--prompt",
        "Streams",
        "--max-new-tokens",
        20,
        "--temperature",
        1.0,
        "--top-p",
        0.9,
        "--seed",
        5,
    )
    streamed, whole = ok(*args), json.loads(ok(*args, "--json").stdout)
    assert streamed.stdout.rstrip("\n") == whole["text"][0].rstrip("\n")
    assert "tokens" in streamed.stderr


def test_token_files_ragged_and_without_a_tokenizer(tmp_path):
    expected = np.load(GOLDEN / "tiny" / "fp8.ragged.npz")
    padded, lengths = expected["ids_padded"], expected["lengths"]
    ids = np.where(np.arange(padded.shape[1]) < lengths[:, None], padded, -1)
    np.save(tmp_path / "ids.npy", ids)
    n = expected["tokens"].shape[1]
    args = ("--tokens", tmp_path / "ids.npy", "--max-new-tokens", n, "--stop", 287, "--dtype", "float32", "--json")
    out = json.loads(ok("generate", GOLDEN / "tiny" / "fp8", *args).stdout)
    for got, want in zip(out["tokens"], expected["tokens"].tolist(), strict=True):
        assert got == want[: len(got)] and (len(got) == n or got[-1] == 287)
    assert out["text"] is None


def test_convert_inspect_export(tmp_path):
    source, converted, back = GOLDEN / "calm" / "fp8", tmp_path / "converted", tmp_path / "back"
    assert json.loads(ok("convert", source, converted, "--json").stdout)["written"] == str(converted)
    found = [json.loads(ok("inspect", path, "--json").stdout) for path in (source, converted)]
    assert [f["format"] for f in found] == ["official", "converted"]
    assert found[0]["by_dtype"] == found[1]["by_dtype"]
    ok("export", converted, back)
    for file in source.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes()
    assert "routed experts" in ok("inspect", converted).stdout


def test_synth_writes_what_inspect_reads(tmp_path):
    ok("synth", "--config", "tiny", "--layers", 3, "--out", tmp_path / "s", "--seed", 1)
    found = json.loads(ok("inspect", tmp_path / "s", "--json").stdout)
    assert "3 layers (1 sliding, 1 CSA, 1 HCA)" in found["model"]


BAD = {
    "no such path": (("generate", "/nowhere", "--prompt", "x"), 1, "/nowhere: no such directory"),
    "neither format": (("inspect", ROOT / "tests"), 1, "neither an official checkpoint"),
    "no prompt": (("generate",), 2, "give one of --prompt"),
    "two prompts": (("generate", "--prompt", "a", "--tokens", "b.npy"), 2, "give one of --prompt"),
    "prompt too long": (("generate", "--prompt", "x" * 40, "--max-tokens", 32), 1, "do not fit the cache of 32"),
    "drafts": (("generate", "--prompt", "x", "--drafts", 2), 1, "drafts=2"),
    "filter without temperature": (("generate", "--prompt", "x", "--top-p", 0.5), 1, "--temperature above 0"),
    "existing destination": (("convert", GOLDEN / "calm" / "fp8", ROOT / "tests"), 1, "exists"),
    "unknown preset": (("synth", "--config", "nano", "--out", "/tmp/x"), 1, "neither a file nor one of flash"),
    "unknown option": (("generate", "--promt", "x"), 2, "No such option"),
    "missing argument": (("convert", "somewhere"), 2, "Missing argument"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_a_line_or_two(name):
    args, status, message = BAD[name]
    done = dsv4(*args)
    assert done.returncode == status
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    if status == 1:
        assert len(done.stderr.strip().splitlines()) <= 2 and done.stdout == ""


def test_debug_shows_the_traceback():
    done = dsv4("inspect", "/nowhere", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr
