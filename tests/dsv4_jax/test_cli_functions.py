"""The `dsv4` command in this process: its options, bad input of every kind, and text as it is put together."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
import dsv4_jax
from checkpoints.synth import with_layers
from dsv4_jax import cli
from dsv4_jax.presets import PRESETS

PROMPT = "Zwölf Boxer"
BOS, EOS, VOCABULARY = 0, 1, 768


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Three layers, one of each kind, with the bundled tokenizer."""
    path = tmp_path_factory.mktemp("cli") / "small"
    checkpoints.synth(with_layers(PRESETS["tiny"], 3) | {"vocab_size": VOCABULARY}, path, seed=7)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoints.bundled_path() / file, path / file)
    return path


@pytest.fixture
def bare(small, tmp_path) -> Path:
    """The same without a tokenizer."""
    return shutil.copytree(small, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))


@pytest.fixture
def dsv4(capsys):
    """Run a command; gives (exit status, stdout, stderr)."""

    def run(*args) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def generated(dsv4):
    """Run `generate --json`; gives the object it prints."""

    def run(*args) -> dict:
        status, out, err = dsv4("generate", *args, "--json")
        assert status == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def refused(dsv4):
    """Run a command that must end in `status` with a short error that says `named`, and nothing on stdout."""

    def run(*args, named: str, status: int = 1) -> None:
        got, out, err = dsv4(*args)
        assert (got, out) == (status, "")
        loaded = [line for line in err.splitlines() if "cache of a sequence" in line]  # what a load says of itself
        rest = err.splitlines()[len(loaded) :]
        assert rest[0].startswith("error: ") and len(loaded) <= 1 and len(rest) <= 2 and "Traceback" not in err
        assert named in "\n".join(rest)

    return run


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "Missing command"),
        (["nonsense"], "nonsense"),
        (["inspect", "--nonsense"], "--nonsense"),
        (["synth", "--config", "tiny"], "--out"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "--prompt-file"),
        (["generate", "--prompt", "a", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["generate", "--prompt", "a", "--stop", "eos"], "--stop"),
    ],
)
def test_usage_errors(refused, args, named):
    refused(*args, named=named, status=2)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--prompt", ""], "empty prompt"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens=0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt", "a", "--kernels", "abacus"], "abacus"),
        (["--prompt", "a", "--numerics", "guess"], "guess"),
        (["--prompt", "a", "--dtype", "int8"], "int8"),
        (["--prompt", "a", "--dtype", "nonsense"], "nonsense"),
        (["--prompt", "a", "--stop", "768"], "768"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "1.5"], "top_p"),
        (["--prompt", "a", "--temperature", "1", "--top-k", "0"], "top_k"),
    ],
)
def test_bad_requests(refused, small, args, named):
    refused("generate", small, *args, named=named)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"3 1 4", "not a .npy file"),
        (b"", "not a .npy file"),
        (np.asarray([None]), "not a .npy file"),
        (np.zeros((1, 4), np.float32), "float32 [1, 4]"),
        (np.zeros((1, 2, 3), np.int32), "int32 [1, 2, 3]"),
        (np.asarray([[5, -1, 7]]), "row 0 has 7 after a -1"),
        (np.asarray([[5, 6], [-1, -1]]), "empty prompt"),
        (np.asarray([5, 768]), "768"),
        (np.asarray([5, -2]), "-2"),
    ],
)
def test_bad_token_files(refused, small, tmp_path, content, named):
    file = tmp_path / "ids.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content, allow_pickle=True)
    refused("generate", small, "--tokens", file, named=named)


def test_archive_instead_of_an_array(refused, small, tmp_path):
    np.savez(tmp_path / "ids.npz", ids=np.zeros(3, np.int32))
    refused("generate", small, "--tokens", tmp_path / "ids.npz", named="archive")


def test_prompt_file_must_be_utf8(refused, small, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    refused("generate", small, "--prompt-file", tmp_path / "prompt.txt", named="prompt.txt: not UTF-8")


def test_text_without_tokenizer(refused, bare):
    refused("generate", bare, "--prompt", "a", named="has no tokenizer.json")


@pytest.mark.parametrize(("content", "named"), [("{", "not JSON"), ("[1]", "JSON object"), ("{}", "missing")])
def test_bad_config_file(refused, tmp_path, content, named):
    (tmp_path / "config.json").write_text(content)
    refused("synth", "--config", tmp_path / "config.json", "--out", tmp_path / "out", named=named)
    assert not (tmp_path / "out").exists()


def test_destination_is_kept_unless_forced(dsv4, refused, small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    refused("convert", small, tmp_path / "mine", named="--force")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert dsv4("convert", small, tmp_path / "mine", "--force")[0] == 0
    assert json.loads(dsv4("inspect", tmp_path / "mine", "--json")[1])["format"] == "converted"


def test_unforeseen_errors_are_short_too(refused, monkeypatch):
    def fail(path):
        raise RuntimeError("out of everything\nat line 1\nat line 2")

    monkeypatch.setattr(checkpoints, "inspect", fail)
    refused("inspect", named="RuntimeError: out of everything")


@pytest.mark.slow
def test_json_is_what_the_library_gives(dsv4, generated, small):
    """Text prompts get a BOS and end at EOS; a stream prints the same text."""
    args = (small, "--prompt", PROMPT, "--max-new-tokens", "12")
    tokenizer = checkpoints.load_tokenizer(small)
    ids = [[BOS, *tokenizer.encode(PROMPT).ids]]
    out = dsv4_jax.generate(checkpoints.load(small), ids, max_new_tokens=12, stop_ids=[EOS])
    want = out.tokens[0, : out.lengths[0]].tolist()
    found = generated(*args)
    assert (found["tokens"], found["text"]) == ([want], [tokenizer.decode(want)])
    status, shown, err = dsv4("generate", *args)
    assert (status, shown) == (0, found["text"][0] + "\n")
    assert err.splitlines()[-1].startswith(f"{len(want)} tokens;")


@pytest.mark.slow
def test_prompts_that_mean_the_same(generated, small, tmp_path):
    """From a file, with the BOS spelt out, and as ids."""
    tokenizer = checkpoints.load_tokenizer(small)
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    np.save(tmp_path / "ids.npy", [BOS, *tokenizer.encode(PROMPT).ids])
    sources = (
        ("--prompt", PROMPT),
        ("--prompt", tokenizer.id_to_token(BOS) + PROMPT),
        ("--prompt-file", tmp_path / "prompt.txt"),
        ("--tokens", tmp_path / "ids.npy", "--stop", EOS),
    )
    found = [generated(small, *source, "--max-new-tokens", "12")["tokens"] for source in sources]
    assert found == [found[0]] * len(sources)


@pytest.mark.slow
def test_stop_ids(generated, small):
    args = (small, "--prompt", PROMPT, "--max-new-tokens", "12")
    free = generated(*args)["tokens"][0]
    stop, unused = free[2], next(i for i in range(VOCABULARY) if i not in free)
    stopped = generated(*args, "--stop", unused, "--stop", stop)
    assert stopped["tokens"] == [free[: free.index(stop) + 1]]


@pytest.mark.slow
def test_sampling_follows_its_seed(generated, small):
    args = (small, "--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "1.5", "--top-p", "0.95", "--seed")
    one, again, other = (generated(*args, seed)["tokens"] for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.slow
def test_rows_and_ids_are_printed_as_ids_without_a_tokenizer(dsv4, generated, bare, tmp_path):
    np.save(tmp_path / "one.npy", [BOS, 80, 90])
    np.save(tmp_path / "two.npy", [[BOS, 80, 90], [BOS, 70, -1]])
    one, two = ((bare, "--tokens", tmp_path / f"{name}.npy", "--max-new-tokens", "6") for name in ("one", "two"))
    (single,), rows = generated(*one)["tokens"], generated(*two)["tokens"]
    assert len(single) == 6 and rows[0] == single  # no stop id unless asked for
    assert dsv4("generate", *one)[1].split() == [str(i) for i in single]
    assert dsv4("generate", *two)[1].splitlines() == [f"[{n}] {' '.join(map(str, r))}" for n, r in enumerate(rows)]


def test_terminal_gets_no_control_characters(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli._write("a\x1b[2Jb\n\té\x9b")
    assert capsys.readouterr().out == "a\ufffd[2Jb\n\té\ufffd"


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoints.load_tokenizer(checkpoints.bundled_path())


def byte_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level tokenizers write them: printable ones as they are, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = byte_alphabet()


def bytes_of(tokenizer, ids) -> bytes:
    """What ids stand for, marks left out."""
    tokens = (tokenizer.id_to_token(i) for i in ids)
    return bytes(ALPHABET[char] for token in tokens if token[0] != "<" or len(token) < 5 for char in token)


def test_tokenizer_ids(tokenizer):
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert tokenizer.id_to_token(BOS) == "<｜begin▁of▁sentence｜>"
    assert tokenizer.id_to_token(EOS) == "<｜end▁of▁sentence｜>"
    assert bytes_of(tokenizer, tokenizer.encode("Aé, the").ids) == "Aé, the".encode()


@given(text=st.text(max_size=40))
@settings(deadline=None)
def test_tokenizer_keeps_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@given(ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=24))
@settings(max_examples=300, deadline=None)
def test_streamed_pieces_are_the_text(tokenizer, ids):
    """Any ids, valid UTF-8 or not: the bytes as Python decodes them, and the pieces join to the whole."""
    pieces = cli._Detokenizer(tokenizer)
    text = "".join([*map(pieces.add, ids), pieces.rest()])
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert text == bytes_of(tokenizer, ids).decode(errors="replace")


def test_half_a_character_is_held_back(tokenizer):
    pieces = cli._Detokenizer(tokenizer)
    char = {byte: char for char, byte in ALPHABET.items()}
    ids = [tokenizer.token_to_id(char[byte]) for byte in "a😀é".encode()]
    assert [pieces.add(i) for i in ids] == ["a", "", "", "", "😀", "", "é"]


@pytest.mark.parametrize("command", ["convert", "export", "inspect", "synth", "generate"])
def test_help_has_an_example(dsv4, command):
    status, out, _ = dsv4(command, "--help")
    assert status == 0 and "xample" in out and f"dsv4 {command}" in out


def test_synth_and_inspect(dsv4, tmp_path):
    assert dsv4("synth", "--config", "tiny", "--layers", 3, "--out", tmp_path / "s", "--seed", 1)[0] == 0
    status, out, _ = dsv4("inspect", tmp_path / "s")
    assert status == 0 and "3 layers (1 sliding, 1 CSA, 1 HCA)" in out and "routed experts" in out
    assert json.loads(dsv4("inspect", tmp_path / "s", "--json")[1])["tensors"] > 100


def test_debug_raises(dsv4):
    with pytest.raises(ValueError, match="/nowhere"):
        dsv4("inspect", "/nowhere", "--debug")
