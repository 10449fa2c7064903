"""Programs compiled ahead: the same tokens as generate, in another process, and refused where they do not belong."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import checkpoints
import dsv4_jax
from dsv4_jax.generate import api
from dsv4_jax.generate.program import MAGIC

PROMPT = np.random.default_rng(3).integers(3, 192, (2, 11)).astype(np.int32)
SAMPLER = dsv4_jax.Sample(temperature=0.9, top_k=20)


@pytest.fixture(scope="module")
def program(small):
    dsv4_jax.generate(small, PROMPT, max_new_tokens=10, sampler=SAMPLER)  # now in JAX's cache, which is of no use here
    return dsv4_jax.compile_program(small, rows=2, prompt_tokens=12, max_new_tokens=10, sampler=SAMPLER)


@pytest.fixture(scope="module")
def saved(program, tmp_path_factory):
    program(PROMPT)  # having run does not keep it from being saved
    path = tmp_path_factory.mktemp("programs") / "two.program"
    program.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return path


def same(got, want) -> None:
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)


def test_gives_what_generate_gives_and_compiles_nothing(small, saved):
    """Other prompts, lengths, seeds, stop ids and temperatures are arguments."""
    program = dsv4_jax.load_program(saved, small)
    before = api.generate_program._cache_size()
    first = program(PROMPT, seed=4)
    options = {"seed": 5, "stop_ids": [int(first.tokens[0, 2])], "lengths": [3, 7], "max_new_tokens": 6}
    other = {"sampler": dsv4_jax.Sample(temperature=0.5, top_k=3)}
    second = program(PROMPT[:, :7], **options, **other)
    assert api.generate_program._cache_size() == before
    same(first, dsv4_jax.generate(small, PROMPT, max_new_tokens=10, sampler=SAMPLER, seed=4))
    same(second, dsv4_jax.generate(small, PROMPT[:, :7], **options, **other))


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (PROMPT[:1], {}),
        (np.ones((2, 17), np.int32), {}),
        (PROMPT, {"max_new_tokens": 17}),
        (PROMPT, {"sampler": dsv4_jax.Greedy()}),
        (PROMPT, {"sampler": dsv4_jax.Sample(temperature=0.9)}),
        (PROMPT, {"stop_ids": list(range(3, 11))}),
    ],
    ids=["rows", "prompt", "new tokens", "sampler", "filters", "stop ids"],
)
def test_what_was_not_compiled_is_refused(program, tokens, options):
    with pytest.raises(ValueError, match="2 prompts of up to 16 tokens, gives up to 16 new ones"):
        program(tokens, **options)


def test_another_model_is_refused(saved):
    other = checkpoints.load(checkpoints.bundled_path(), max_tokens=64)
    with pytest.raises(ValueError, match=r"two.program: built for another model '\w+', not '\w+'; compile it anew"):
        dsv4_jax.load_program(saved, other)


def test_damaged_files_are_refused(small, saved, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="file: not a saved program; write one with dsv4_jax.compile_program"):
        dsv4_jax.load_program(path, small)
    path.write_bytes(saved.read_bytes()[:-9])
    with pytest.raises(ValueError, match="file: damaged or cut short; write it again"):
        dsv4_jax.load_program(path, small)
    path.write_bytes(saved.read_bytes().replace(b'"device": "', b'"device": "not a ', 1))
    with pytest.raises(ValueError, match="file: damaged or cut short"):
        dsv4_jax.load_program(path, small)
    assert saved.read_bytes().startswith(MAGIC)


def test_another_release_of_jaxlib_is_refused(small, saved, monkeypatch):
    monkeypatch.setattr("jaxlib.version.__version__", "0.0.1")
    with pytest.raises(ValueError, match=r"two.program: built for another jaxlib '[\d.]+', not '0.0.1'; compile it"):
        dsv4_jax.load_program(saved, small)


def test_a_sampler_of_ones_own_is_not_saved(small, tmp_path):
    class Last(dsv4_jax.Greedy):
        pass

    from dsv4_jax.generate.program import Bucket, Program

    own = Program(small, Bucket(1, 4, 4, Last(), 0, False), None, b"")
    with pytest.raises(ValueError, match="cannot be named in a file; choose one of Greedy, Sample"):
        own.save(tmp_path / "own")


CHILD = """
import sys, checkpoints, dsv4_jax
model = checkpoints.load(checkpoints.bundled_path(), max_tokens=64)
print(dsv4_jax.load_program(sys.argv[1], model)([5, 6, 7]).tokens[0].tolist())
"""


@pytest.mark.slow
def test_another_process_runs_it(tmp_path):
    """One with a device, and one with four."""
    model = checkpoints.load(checkpoints.bundled_path(), max_tokens=64)
    program = dsv4_jax.compile_program(model, prompt_tokens=3, max_new_tokens=8, drafts=1)
    program.save(tmp_path / "one")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "one")]
    want = str(program([5, 6, 7]).tokens[0].tolist())
    for devices in (1, 4):
        flags = {"JAX_COMPILATION_CACHE_DIR": "", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        child = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | flags)
        assert child.stdout.splitlines()[-1] == want
