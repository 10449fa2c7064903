"""Hub ids, with a stand-in for the hub library: no network."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden_cases import GOLDEN

import checkpoints
from checkpoints import CheckpointError
from checkpoints.hub import local_path

CALM = GOLDEN / "calm" / "fp8"


@pytest.fixture
def hub(monkeypatch):
    """The calls that reach the library; it answers with a local directory, or raises what `error` holds."""
    fake = SimpleNamespace(calls=[], error=None)

    def snapshot_download(repo, revision, ignore_patterns):
        fake.calls.append((repo, revision))
        assert "*.safetensors" not in ignore_patterns
        if fake.error:
            raise fake.error
        return str(CALM)

    fake.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_ids_are_downloaded(hub, tmp_path):
    name = "deepseek-ai/DeepSeek-V4-Flash"
    assert checkpoints.inspect(name).tensors == 243
    checkpoints.verify(checkpoints.convert(f"{name}@refs/pr/3", tmp_path / "converted"), name)
    checkpoints.load(name, max_tokens=8)
    assert checkpoints.load_tokenizer(name) is None
    revisions = [revision for repo, revision in hub.calls if repo == name]
    assert revisions == [None, "refs/pr/3", None, None, None] and len(hub.calls) == 5


@pytest.mark.parametrize("path", [CALM, str(CALM), "/no/where", "./a/b", "../a", "a", "a/b/c", "a/", "org/.hidden", ""])
def test_paths_are_not(path, hub):
    assert local_path(path) == Path(path)
    assert hub.calls == []


def test_a_directory_of_that_name_comes_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert local_path("org/model") == Path("org/model")
    assert hub.calls == []


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # makes the import fail
    with pytest.raises(CheckpointError, match=r"org/model: no such directory; .*pip install 'dsv4-jax\[hub\]'"):
        checkpoints.load("org/model")


@pytest.mark.parametrize("error", [OSError("401 Client Error.\n\nRepository Not Found"), ValueError("bad revision")])
def test_what_the_hub_answers_is_told(error, hub, tmp_path):
    hub.error = error
    with pytest.raises(
        CheckpointError, match=r"org/model: no such directory, and not to be had from the hub \("
    ) as told:
        checkpoints.convert("org/model", tmp_path / "out")
    assert "\n" not in str(told.value) and list(tmp_path.iterdir()) == []
