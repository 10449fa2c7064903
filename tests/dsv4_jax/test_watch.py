"""What a stream says of itself: against `generate`, and as the command prints it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from golden_cases import FULL

import dsv4_jax
from dsv4_jax import cli
from dsv4_jax.watch import WatchedStream, peak_memory_bytes

PROMPT = np.arange(3, 12)[None]


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 2] if FULL else [2])
def test_stream_counts_what_generate_counts(small, drafts):
    request = {"max_new_tokens": 24, "drafts": drafts}
    want = dsv4_jax.generate(small, PROMPT, **request)
    schedule = small.schedule
    watched = WatchedStream(small, PROMPT, **request)
    tokens = [int(event.tokens[0]) for event in watched]
    found = watched.stats
    assert tokens == want.tokens[0].tolist() and small.schedule is schedule
    for name in ("prompt_tokens", "new_tokens", "steps", "drafted", "accepted", "acceptance", "tokens_per_step"):
        assert getattr(found, name) == getattr(want.stats, name), name
    assert 24 - (1 + (1 + drafts)) <= found.warm_tokens < 24  # all but the prompt's token and the first step's
    assert 0 < found.first_seconds < found.seconds and found.warm_seconds < found.seconds - found.first_seconds
    assert found.to_json()["warm_tokens_per_second"] == found.warm_tokens / found.warm_seconds


def test_rows_are_counted_together_and_one_token_has_no_rate(small):
    rows, lengths = np.repeat(PROMPT, 2, axis=0), np.array([9, 4])
    watched = WatchedStream(small, rows, lengths=lengths, max_new_tokens=1)
    assert watched.stats.new_tokens == 0
    list(watched)
    assert (watched.stats.prompt_tokens, watched.stats.new_tokens, watched.stats.steps) == (13, 2, 1)
    assert watched.stats.warm_tokens_per_second == 0


@pytest.mark.slow
def test_command_prints_rate_drafts_and_memory(capsys):
    args = ["generate", "--prompt", "And", "--max-new-tokens", "12", "--drafts", "2", "--max-tokens", "64"]
    assert cli.main([*args, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    assert stats["new_tokens"] == 12 and len(stats["acceptance"]) == 2 and stats["warm_tokens_per_second"] > 0
    assert 50e6 < stats["peak_memory_bytes"] <= peak_memory_bytes()
    assert cli.main(args) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    shares = " ".join(f"{share:.2f}" for share in stats["acceptance"])
    assert f"; {stats['steps']} steps of {stats['tokens_per_step']:.2f} tokens; drafts accepted {shares};" in line
    assert line.startswith("12 tokens; first after ") and "tokens/s" in line and "peak memory" in line
