"""Drafts never change the text: against decoding without them, for good, bad and adversarial drafts."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FULL, GOLDEN, assert_logits_close, case_name, expected, load_model, slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import small

import checkpoints
import dsv4_jax
from dsv4_jax import DeepseekV4
from dsv4_jax.generate import api, prepare
from dsv4_jax.generate.decode import Shapes, generate_tokens
from dsv4_jax.generate.sampling import Greedy, Sample, row_keys
from dsv4_jax.generate.speculative import Drafter, MtpDrafter
from dsv4_jax.random_weights import random_weights

TINY, CALM = GOLDEN / "tiny" / "fp8", GOLDEN / "calm" / "fp8"


def prompt(length: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 60, (rows, length))


def same(model, tokens, drafts: int, **request) -> api.Generation:
    want = dsv4_jax.generate(model, tokens, **request)
    got = dsv4_jax.generate(model, tokens, drafts=drafts, **request)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    return got


GREEDY = [(path, drafts) for path in (TINY, CALM, GOLDEN / "calm" / "fp8base") for drafts in (1, 2, 4)]
CHECKED = GREEDY if FULL else [(TINY, 4), (CALM, 1), GREEDY[-2]]


def named(path, drafts: int):
    return (pytest.param if (path, drafts) == (CALM, 1) else slow)(path, drafts, id=f"{case_name(path)}-{drafts}")


@pytest.mark.parametrize("path, drafts", [named(*case) for case in CHECKED])
def test_golden_greedy_tokens(path, drafts):
    want = expected(path, "greedy")
    out = dsv4_jax.generate(load_model(path), want["prompt_ids"], max_new_tokens=64, drafts=drafts)
    np.testing.assert_array_equal(out.tokens, want["tokens"])
    assert out.stats.drafted == (out.stats.steps - 1) * drafts and len(out.stats.accepted) == drafts


@pytest.mark.slow
@pytest.mark.parametrize("length", [*range(1, 9), 120, *range(125, 133)])
def test_every_edge_of_the_compression_windows(length):
    same(small(), prompt(length), 4, max_new_tokens=12)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [1, 3, 8] if FULL else [3])
def test_uneven_rows_stops_and_budgets(drafts):
    model, tokens, lengths = small(), prompt(24, rows=4), [24, 3, 17, 9]
    plain = dsv4_jax.generate(model, tokens, lengths=lengths, max_new_tokens=16)
    stop = [int(plain.tokens[0, 5]), int(plain.tokens[2, 11])]
    for new in (1, 2, 7, 16):
        got = same(model, tokens, drafts, lengths=lengths, max_new_tokens=new, stop_ids=stop)
        assert got.lengths.max() <= new


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 140), min_size=2, max_size=2),
    drafts=st.sampled_from([1, 2, 4] if FULL else [2]),
    seed=st.integers(0, 5),
)
def test_any_prompts(lengths, drafts, seed):
    same(small(), prompt(140, rows=2, seed=seed), drafts, lengths=lengths, max_new_tokens=9)


@dataclass(frozen=True)
class Scripted(Drafter):
    """Drafts what the plain run gave (`truth` [B, N]), spoiled where `wrong` [count] says so."""

    count: int
    truth: jax.Array
    wrong: jax.Array

    def init(self, model, batch):
        return jnp.zeros((), jnp.int32)

    def observe(self, model, memory, streams, following, start, count):
        return memory, None

    def propose(self, model, memory, seen, end, sampler, keys, first):
        truth = jnp.pad(self.truth, ((0, 0), (0, self.count)))
        index = first[:, None] + jnp.arange(self.count)
        right = jnp.take_along_axis(truth, index, axis=1)
        return jnp.where(self.wrong, (right + 1) % model.config.vocab_size, right), memory


@functools.partial(jax.jit, static_argnames="shapes")
def generate_scripted(model, padded, lengths, new, truth, wrong, shapes):
    rows = len(padded)
    drafter = Scripted(wrong.shape[0], truth, wrong)
    keys, stop = row_keys(jnp.uint32(0), rows), jnp.full(8, -2, jnp.int32)
    return generate_tokens(model, padded, lengths, new, Greedy(), keys, stop, shapes=shapes, drafter=drafter)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [(0, 0, 0, 0), (1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
@pytest.mark.parametrize("length", [5, 126])
def test_adversarial_drafts(wrong, length):
    model, new = small(), 21
    tokens = prompt(length, rows=2)
    truth = dsv4_jax.generate(model, tokens, max_new_tokens=new).tokens
    shapes = Shapes.of(length, new, model.max_tokens)
    padded = np.pad(tokens, ((0, 0), (0, shapes.prompt - length))).astype(np.int32)
    lengths = np.full(2, length, np.int32)
    out = generate_scripted(model, padded, lengths, np.int32(new), truth, np.array(wrong, bool), shapes)
    np.testing.assert_array_equal(out.tokens[:, :new], truth)
    gained = wrong.index(1) + 1 if 1 in wrong else 5
    assert int(out.steps) == -(-(new - 1) // gained)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 3] if FULL else [3])
def test_one_or_several_mtp_layers(layers):
    model = small(layers)
    got = same(model, prompt(30), 4, max_new_tokens=16)
    assert len(got.stats.acceptance) == 4


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", [jnp.bfloat16, "fp8"] if FULL else ["fp8"])
def test_caches_of_fewer_bits(cache_dtype):
    model = checkpoints.load(CALM, max_tokens=256, dtype=jnp.float32, numerics="exact", cache_dtype=cache_dtype)
    same(model, expected(CALM, "greedy")["prompt_ids"], 2, max_new_tokens=24)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3] if FULL else [3])
def test_stream_gives_what_generate_gives(drafts):
    model, request = small(), {"lengths": [20, 11], "max_new_tokens": 15}
    want = dsv4_jax.generate(model, prompt(20, rows=2), **request)
    rows: list[list[int]] = [[], []]
    for event in dsv4_jax.stream(model, prompt(20, rows=2), drafts=drafts, **request):
        for row, token in zip(rows, event.tokens.tolist(), strict=True):
            row.extend([token] if token >= 0 else [])
        assert [len(row) >= 15 for row in rows] == event.done.tolist()
    assert rows == want.tokens.tolist()


SAMPLERS = (Sample(temperature=1.3, top_p=0.9), Sample(temperature=0.8), Sample(top_k=5))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS if FULL else SAMPLERS[:1])
def test_sampled_tokens_are_those_without_drafts(sampler):
    same(small(), prompt(12, rows=3), 3, max_new_tokens=20, sampler=sampler, seed=11)


@pytest.mark.slow
def test_sampled_drafts_follow_the_target_distribution():
    """Second and third new token of 20,000 rows against the model's own probabilities: chi-squared, p > 0.001."""
    model, rows = small(), 20_000
    model.lm_head.set_value(model.lm_head[...] * jnp.where(jnp.arange(64) < 8, 1.0, 0.0)[:, None])  # 8 likely tokens
    try:
        ids = prompt(6)
        out = dsv4_jax.generate(
            model, np.repeat(ids, rows, 0), max_new_tokens=3, drafts=2, sampler=Sample(temperature=1.0), seed=3
        )
        assert 0 < out.stats.accepted[0] < out.stats.drafted // 2  # some drafts were right and some were not
        for position in (1, 2):
            prefixes, counts = np.unique(out.tokens[:, :position], axis=0, return_counts=True)
            prefix = prefixes[counts.argmax()]
            drawn = out.tokens[(out.tokens[:, :position] == prefix).all(1), position]
            logits = np.asarray(dsv4_jax.logits(model, np.concatenate([ids[0], prefix]))[0, -1], np.float64)
            wanted = np.exp(logits - logits.max())
            wanted *= len(drawn) / wanted.sum()
            seen = np.bincount(drawn, minlength=64)
            chi2 = ((seen - wanted) ** 2 / wanted).sum()
            assert chi2 < 103.4, (position, chi2, len(drawn))  # the 0.999 quantile for 63 degrees of freedom
    finally:
        small.cache_clear()


def start_decoding(model, tokens: np.ndarray, drafter, new: int, shapes: Shapes):
    """The state after prefill, and a function that runs (or, given `api._steps.lower`, lowers) one step."""
    keys = np.asarray(jax.random.key_data(row_keys(jnp.uint32(0), 1)))
    rest = (np.full(1, new, np.int32), Greedy(), keys, np.full(8, -2, np.int32))
    length = np.asarray([tokens.shape[1]], np.int32)
    padded = np.pad(tokens, ((0, 0), (0, shapes.prompt - tokens.shape[1]))).astype(np.int32)
    parts, how = prepare.split(model), {"drafter": drafter, "alone": False}
    state, _ = api._start(*parts, padded, length, *rest, shapes=shapes, **how)
    return state, lambda state, run=api._steps: run(*parts, *rest, np.int32(1), state, steps=1, **how)


@pytest.mark.slow
def test_own_rows_come_from_the_main_models_streams():
    """After drafting, the rows of the MTP cache up to the cursor equal those fed with the whole text at once."""
    model = small()
    tokens = prompt(40)
    text = jnp.asarray(np.concatenate([tokens, dsv4_jax.generate(model, tokens, max_new_tokens=24).tokens], axis=1))
    state, step = start_decoding(model, tokens, MtpDrafter(4), 24, Shapes(64, 32, 128, 64))
    for _ in range(3):
        state, _ = step(state)
    cursor = int(state.cache.length[0])
    zero, count = jnp.zeros(1, jnp.int32), jnp.full(1, cursor)
    streams, _ = model(text[:, :cursor], model.init_cache(1), count)
    fresh = model.init_mtp_cache(1, drafts=4)[0]
    _, whole = model.draft(0, streams, text[:, 1 : cursor + 1], fresh, zero, count)
    held = np.arange(cursor - model.config.sliding_window, cursor) % whole.window.shape[1]
    np.testing.assert_allclose(state.drafts.memory.caches[0].window[0, held], whole.window[0, held], atol=1e-5)


def test_mtp_logits_of_the_drafter_equal_the_golden_ones():
    want = expected(TINY, "mtp")
    model = load_model(TINY)
    T = want["next_ids"].shape[1]
    start, count = jnp.zeros(1, jnp.int32), jnp.full(1, T, jnp.int32)
    memory, _ = MtpDrafter(1).observe(
        model,
        MtpDrafter(1).init(model, 1),
        jnp.asarray(want["streams"]),
        jnp.asarray(want["next_ids"], jnp.int32),
        start,
        count,
    )
    assert_logits_close(model.draft_head(0, memory.last[0][:, None])[:, 0], want["logits"][:, -1])


@pytest.mark.slow
def test_drafts_take_ring_slack_and_nothing_else():
    """A step's cache aliases the next one's, its temporaries hold no copy of it, and drafts add rows to rings only."""
    config = dataclasses.replace(small().config, index_n_heads=2)  # scores are temporaries too
    model = random_weights(lambda: DeepseekV4(config, max_tokens=65536, dtype=jnp.float32), seed=0)
    nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    held = {}
    for drafts in (0, 4):
        drafter = MtpDrafter(drafts) if drafts else None
        state, step = start_decoding(model, prompt(9), drafter, 9, Shapes(64, 16, 65536, 64))
        sizes = step(state, api._steps.lower).compile().memory_analysis()
        held[drafts] = nbytes(state.cache)
        assert sizes.alias_size_in_bytes >= 0.99 * nbytes(state)
        assert sizes.temp_size_in_bytes < 0.2 * held[drafts]
    rings = [ring for c in state.cache.layers for ring in jax.tree.leaves(c) if ring.shape[1] in (20, 12, 132)]
    assert held[4] - held[0] == 4 * sum(ring.nbytes // ring.shape[1] for ring in rings)
