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


def test_help_names_every_command():
    out = ok("--help").stdout
    assert all(command in out for command in ("convert", "export", "inspect", "synth", "generate", "chat"))


def test_bundled_checkpoint_streams_what_it_gives_as_json():
    args = ("generate", "--prompt", "The first minute", "--max-new-tokens", 12, "--temperature", 1.0, "--seed", 5)
    streamed, whole = ok(*args), json.loads(ok(*args, "--json").stdout)
    assert streamed.stdout.rstrip("\n") == whole["text"][0].rstrip("\n")
    assert 1 <= whole["stats"]["new_tokens"] == len(whole["tokens"][0]) <= 12
    assert "tokens" in streamed.stderr


@pytest.mark.slow
def test_compiled_programs_are_kept_where_asked(tmp_path):
    kept = tmp_path / "compiled"
    args = ("generate", GOLDEN / "calm" / "fp8", "--tokens", tmp_path / "ids.npy", "--max-new-tokens", 2)
    np.save(tmp_path / "ids.npy", np.arange(1, 9))
    texts, files = set(), []
    for cache in ("off", kept, kept):
        texts.add(ok(*args, "--compilation-cache", cache).stdout)
        files.append({f.name for f in kept.glob("*-cache")})
    assert len(texts) == 1
    assert not files[0] and files[1] and files[2] == files[1]


@pytest.mark.slow
def test_token_files_ragged_and_without_a_tokenizer(tmp_path):
    expected = np.load(GOLDEN / "tiny" / "fp8.ragged.npz")
    padded, lengths = expected["ids_padded"], expected["lengths"]
    ids = np.where(np.arange(padded.shape[1]) < lengths[:, None], padded, -1)
    np.save(tmp_path / "ids.npy", ids)
    n = expected["tokens"].shape[1]
    args = ("--tokens", tmp_path / "ids.npy", "--max-new-tokens", n, "--stop", 287, "--dtype", "float32")
    out = json.loads(ok("generate", GOLDEN / "tiny" / "fp8", *args, "--numerics", "exact", "--json").stdout)
    for got, want in zip(out["tokens"], expected["tokens"].tolist(), strict=True):
        assert got == want[: len(got)] and (len(got) == n or got[-1] == 287)
    assert out["text"] is None


def test_convert_then_export(tmp_path):
    source, converted, back = GOLDEN / "calm" / "fp8", tmp_path / "converted", tmp_path / "back"
    assert json.loads(ok("convert", source, converted, "--json").stdout)["written"] == str(converted)
    ok("export", converted, back)
    for file in source.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes()


# Bad input of every other kind is tried in process, in dsv4_jax/test_cli_functions.py.
BAD = {
    "no such path": (("inspect", "/nowhere"), 1, "/nowhere: no such directory"),
    "prompt too long": (("generate", "--prompt", "x" * 40, "--max-tokens", 32), 1, "do not fit the cache of 32"),
    "unknown option": (("generate", "--promt", "x"), 2, "No such option"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_a_line_or_two(name):
    args, status, message = BAD[name]
    done = dsv4(*args)
    assert done.returncode == status
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    if status == 1:
        assert len(done.stderr.strip().splitlines()) <= 2 and done.stdout == ""


@pytest.mark.slow
def test_chat_answers_and_leaves_at_the_end_of_input():
    command = [sys.executable, "-m", "dsv4_jax.cli", "chat", "--max-new-tokens", "6", "--temperature", "0"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(command, input="Hello\n/nonsense\n", capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "6 tokens" in done.stderr and "/nonsense: no such command" in done.stderr and done.stdout
