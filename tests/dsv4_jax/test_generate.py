"""generate, stream and logits: the contract with callers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import slow

import dsv4_jax
from dsv4_jax.generate import api
from dsv4_jax.generate.decode import Shapes, bucket, generate_tokens
from dsv4_jax.generate.sampling import row_keys
from dsv4_jax.kernels import XlaKernels

PROMPT = np.random.default_rng(0).integers(3, 192, (3, 23)).astype(np.int32)


def greedy(model, tokens, n, **options):
    return dsv4_jax.generate(model, tokens, max_new_tokens=n, **options)


def test_result_shapes_and_statistics(small):
    out = greedy(small, PROMPT, 9)
    assert out.tokens.shape == (3, 9) and out.tokens.dtype == np.int32
    assert out.lengths.tolist() == [9, 9, 9] and out.lengths.dtype == np.int32
    stats = out.stats.to_json()
    assert stats["prompt_tokens"] == 69 and stats["new_tokens"] == 27 and stats["steps"] == 9
    assert stats["tokens_per_second"] > 0 and stats["drafted"] == 0


def test_generated_tokens_are_the_argmax_of_the_logits(small):
    out = greedy(small, PROMPT, 6)
    text = np.concatenate([PROMPT, out.tokens], axis=1)
    logits = np.asarray(dsv4_jax.logits(small, text))
    np.testing.assert_array_equal(logits[:, 22:-1].argmax(-1), out.tokens)


def test_stop_id_is_returned_and_ends_its_row_alone(small):
    free = greedy(small, PROMPT, 12).tokens
    stop = int(free[1, 4])
    out = greedy(small, PROMPT, 12, stop_ids=[stop])
    for row in range(3):
        hits = np.flatnonzero(free[row] == stop)
        n = int(hits[0]) + 1 if hits.size else 12
        assert out.lengths[row] == n
        np.testing.assert_array_equal(out.tokens[row, :n], free[row, :n])
        assert (out.tokens[row, n:] == -1).all()


@pytest.mark.slow
def test_stops_early_when_every_row_has(small):
    first = greedy(small, PROMPT[:1], 1).tokens
    out = greedy(small, PROMPT[:1], 16, stop_ids=[int(first[0, 0])])
    assert out.stats.steps == 1 and out.lengths.tolist() == [1]


@pytest.mark.parametrize("sampler", [dsv4_jax.Greedy(), slow(dsv4_jax.Sample(temperature=0.8, top_k=40, top_p=0.9))])
def test_stream_yields_what_generate_returns(small, sampler):
    free = greedy(small, PROMPT, 20, sampler=sampler, seed=3)
    stop = [int(free.tokens[0, 6])]
    want = greedy(small, PROMPT, 20, sampler=sampler, seed=3, stop_ids=stop)
    events = list(dsv4_jax.stream(small, PROMPT, max_new_tokens=20, sampler=sampler, seed=3, stop_ids=stop))
    got = np.stack([event.tokens for event in events], axis=1)
    np.testing.assert_array_equal(got, want.tokens[:, : got.shape[1]])
    assert (want.tokens[:, got.shape[1] :] == -1).all()
    assert [event.step for event in events] == list(range(len(events)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3])
def test_stream_of_few_tokens(small, n):
    events = list(dsv4_jax.stream(small, PROMPT[:1], max_new_tokens=n))
    assert [int(e.tokens[0]) for e in events] == greedy(small, PROMPT[:1], n).tokens[0].tolist()


@pytest.mark.slow
def test_stream_can_be_left_early(small):
    for event in dsv4_jax.stream(small, PROMPT[:1], max_new_tokens=50):
        if event.step == 2:
            break
    assert event.tokens[0] == greedy(small, PROMPT[:1], 3).tokens[0, 2]


@pytest.mark.slow
def test_sampling_depends_on_the_seed_alone(small):
    sampler = dsv4_jax.Sample(temperature=1.5)
    run = lambda tokens, seed: greedy(small, tokens, 10, sampler=sampler, seed=seed).tokens
    np.testing.assert_array_equal(run(PROMPT, 1), run(PROMPT, 1))
    assert (run(PROMPT, 1) != run(PROMPT, 2)).any()
    same = np.repeat(PROMPT[:1], 3, axis=0)
    drawn = run(same, 7)
    assert (drawn[0] != drawn[1]).any() and (drawn[1] != drawn[2]).any()  # rows draw their own numbers
    seeds = [11, 12, 13]
    batch = run(PROMPT, seeds)
    for row in range(3):  # a row with its own seed is that row run alone
        np.testing.assert_array_equal(batch[row], run(PROMPT[row : row + 1], seeds[row])[0])


def test_ragged_rows_do_not_depend_on_each_other(small):
    lengths = np.array([5, 23, 11])
    out = greedy(small, PROMPT, 8, lengths=lengths)
    other = PROMPT.copy()
    other[1] = 9
    np.testing.assert_array_equal(greedy(small, other, 8, lengths=lengths).tokens[[0, 2]], out.tokens[[0, 2]])
    for row, n in enumerate(lengths):
        np.testing.assert_array_equal(greedy(small, PROMPT[row, :n], 8).tokens[0], out.tokens[row])


@pytest.mark.slow
def test_prompt_longer_than_a_chunk(small, monkeypatch):
    ids = np.random.default_rng(1).integers(3, 192, (2, 150)).astype(np.int32)
    lengths = np.array([150, 70])
    want = greedy(small, ids, 6, lengths=lengths).tokens
    whole = np.asarray(dsv4_jax.logits(small, ids))
    monkeypatch.setattr(XlaKernels, "prefill_chunk", 32)
    np.testing.assert_array_equal(greedy(small, ids, 6, lengths=lengths).tokens, want)
    np.testing.assert_allclose(np.asarray(dsv4_jax.logits(small, ids)), whole, atol=1e-3)


def test_no_recompilation_within_a_bucket(small):
    greedy(small, PROMPT[:1, :17], 10, sampler=dsv4_jax.Sample(temperature=0.5))
    before = api.generate_program._cache_size()
    for n in (18, 20, 23):
        greedy(small, PROMPT[:1, :n], 16, sampler=dsv4_jax.Sample(temperature=0.1 * n), seed=n, stop_ids=[n])
    assert api.generate_program._cache_size() == before


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 512, 513)] == [16, 16, 32, 512, 1024]
    shapes = Shapes.of(600, 30, 8192)
    assert (shapes.prompt, shapes.chunk, shapes.new, shapes.capacity) == (1024, 512, 32, 1056)
    assert Shapes.of(600, 30, 700).capacity == 700
    assert Shapes.of(600, 30, 700, chunk=2048).chunk == 1024


@pytest.mark.slow
def test_works_inside_a_users_program(small):
    """The pure function under the front door composes with jit."""
    shapes = Shapes.of(23, 8, 256)
    tokens = np.pad(PROMPT, ((0, 0), (0, shapes.prompt - 23)))

    @jax.jit
    def rollout(model, tokens):
        keys, stop = row_keys(jnp.uint32(0), 3), jnp.full((8,), -2)
        out = generate_tokens(model, tokens, jnp.full((3,), 23), jnp.int32(8), dsv4_jax.Greedy(), keys, stop, shapes)
        return out.tokens[:, :8]

    np.testing.assert_array_equal(rollout(small, tokens), greedy(small, PROMPT, 8).tokens)


BAD = {
    "empty prompt": (dict(tokens=np.zeros((1, 0), int)), "empty prompt"),
    "zero length": (dict(tokens=[[5, 6]], lengths=[0]), r"empty prompt: lengths\[0\]=0"),
    "length past the end": (dict(tokens=[[5, 6]], lengths=[3]), r"lengths\[0\]=3"),
    "id too large": (dict(tokens=[[5, 192]]), "id 192 is outside the vocabulary 0 .. 191"),
    "id negative": (dict(tokens=[[-1, 5]]), "id -1 is outside"),
    "float tokens": (dict(tokens=[[0.5]]), "must be integers"),
    "three axes": (dict(tokens=np.zeros((1, 1, 1), int)), r"must be \[B, T\]"),
    "too long": (dict(tokens=np.ones((1, 1020), int)), "1020 prompt tokens .* do not fit the cache of 1024"),
    "no new tokens": (dict(tokens=[[5]], max_new_tokens=0), "max_new_tokens=0"),
    "stop id": (dict(tokens=[[5]], stop_ids=[999]), "stop_ids: id 999"),
    "sampler": (dict(tokens=[[5]], sampler="greedy"), "must be a Sampler"),
    "seeds": (dict(tokens=[[5]], seed=[1, 2]), "seed must be one integer or 1"),
    "drafts": (dict(tokens=[[5]], drafts=9), "drafts=9 must be an integer between 0 and 8"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("call", [dsv4_jax.generate, dsv4_jax.stream])
def test_bad_requests_are_refused_before_any_work(small, name, call):
    request, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(small, **({"max_new_tokens": 8} | request))


def test_logits_of_too_long_a_text(small):
    with pytest.raises(ValueError, match="1025 prompt tokens do not fit"):
        dsv4_jax.logits(small, np.ones((1, 1025), int))
