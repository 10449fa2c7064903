"""Chunked = whole = token by token, for every split, ragged rows included."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax import DeepseekV4, ModelConfig
from dsv4_jax.cache import CacheFormat, Step, cache_bytes, init_layer_cache, read_rows, write_ring
from dsv4_jax.config import CSA, HCA, SLIDING
from dsv4_jax.presets import PRESETS
from dsv4_jax.random_weights import random_weights

T = 300  # crosses two HCA windows and wraps the ring
WIDTHS = (1, 5, 64)  # compiled step widths: in place, small, banded
ATOL = 2e-4


@functools.cache
def model() -> DeepseekV4:
    """One layer of each kind, official ratios 4 and 128, a selective indexer."""
    fields = PRESETS["tiny"] | {
        "num_hidden_layers": 3,
        "num_hash_layers": 1,
        "compress_ratios": [0, 4, 128],
        "num_nextn_predict_layers": 0,
        "sliding_window": 32,
        "index_topk": 24,
        "quantization_config": None,
        "expert_dtype": None,
        "hidden_size": 64,
        "q_lora_rank": 32,
        "o_lora_rank": 16,
    }
    config = ModelConfig.from_dict(fields)
    return random_weights(lambda: DeepseekV4(config, max_tokens=T + 64, dtype=jnp.float32), seed=1)


@functools.cache
def tokens(rows: int = 1) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 288, (rows, T)).astype(np.int32)


@jax.jit
def step(model, piece, cache, count):
    return model(piece, cache, count)


@functools.cache
def whole() -> np.ndarray:
    """Streams of one pass over all T tokens."""
    streams, cache = step(model(), jnp.asarray(tokens()), model().init_cache(1, T + 64), jnp.asarray([T]))
    assert cache.length.tolist() == [T]
    return np.asarray(streams[0])


def run(pieces: list[tuple[int, int]], drafts: int = 0) -> np.ndarray:
    """Streams of the tokens, given as (compiled width, real tokens) steps."""
    cache, out, start = model().init_cache(1, T + 64, drafts=drafts), [], 0
    for width, count in pieces:
        piece = np.full((1, width), 7, np.int32)  # what is not real must not matter
        piece[:, :count] = tokens()[:, start : start + count]
        streams, cache = step(model(), jnp.asarray(piece), cache, jnp.asarray([count]))
        out.append(np.asarray(streams[0, :count]))
        start += count
    assert cache.length.tolist() == [start]
    return np.concatenate(out)


@st.composite
def splits(draw):
    """Steps that cover all T tokens, of any size, padded or not."""
    pieces, left = [], T
    while left:
        width = draw(st.sampled_from(WIDTHS))
        count = draw(st.integers(0 if width > 1 else 1, min(width, left)))
        pieces.append((width, count))
        left -= count
    return pieces


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(splits())
def test_any_split_equals_one_pass(pieces):
    np.testing.assert_allclose(run(pieces), whole(), atol=ATOL)


@pytest.mark.slow
def test_token_by_token_equals_one_pass():
    np.testing.assert_allclose(run([(1, 1)] * T), whole(), atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize("first", [*range(60, 69), *range(124, 133), *range(252, 261)])
def test_split_around_every_window_edge(first):
    """A first part that ends at each offset mod 4 and around multiples of 128, then single tokens over the edge."""
    head = [(64, 64)] * (first // 64) + [(64, first % 64)]
    got = run([*head, *[(1, 1)] * 6])
    np.testing.assert_allclose(got, whole()[: first + 6], atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [4, 7])
def test_rejected_tokens_leave_no_trace(drafts):
    """Five-token steps of which only some are kept: the cursor goes back, the rest is overwritten."""
    rng = np.random.default_rng(drafts)
    cache, out, start = model().init_cache(1, T + 64, drafts=drafts), [], 0
    while start < 280:
        piece = rng.integers(0, 288, (1, 5)).astype(np.int32)
        kept = int(rng.integers(1, 6))
        piece[:, :kept] = tokens()[:, start : start + kept]
        streams, after = step(model(), jnp.asarray(piece), cache, jnp.asarray([5]))
        out.append(np.asarray(streams[0, :kept]))
        start += kept
        cache = type(after)(after.layers, jnp.asarray([start], jnp.int32))
    np.testing.assert_allclose(np.concatenate(out), whole()[:start], atol=ATOL)


@pytest.mark.slow
def test_rows_at_different_positions_do_not_mix():
    """A batch whose rows advance by different counts, some by none, equals each row run alone."""
    rng = np.random.default_rng(3)
    ids, starts = tokens(3), np.zeros(3, int)
    cache, out = model().init_cache(3, T + 64), [[], [], []]
    for _ in range(12):
        counts = rng.integers(0, 25, 3)
        piece = np.zeros((3, 64), np.int32)
        for b in range(3):
            piece[b, : counts[b]] = ids[b, starts[b] : starts[b] + counts[b]]
        streams, cache = step(model(), jnp.asarray(piece), cache, jnp.asarray(counts, jnp.int32))
        for b in range(3):
            out[b].append(np.asarray(streams[b, : counts[b]]))
        starts += counts
    for b in range(3):
        alone = np.zeros((1, T), np.int32)
        alone[:, : starts[b]] = ids[b, : starts[b]]
        want, _ = step(model(), jnp.asarray(alone), model().init_cache(1, T + 64), jnp.asarray([starts[b]]))
        np.testing.assert_allclose(np.concatenate(out[b]), want[0, : starts[b]], atol=ATOL)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 12), st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_ring_holds_the_newest_positions(width, slots, counts):
    ring, start, history = jnp.full((1, slots, 1), -1.0), 0, []
    for count in counts:
        count = min(count, width)
        rows = jnp.arange(start, start + width, dtype=jnp.float32).reshape(1, -1, 1)
        at = Step(jnp.zeros((1, width), jnp.int32), jnp.asarray([start]), jnp.asarray([count]))
        if count:
            wanted = jnp.arange(max(0, start + count - slots), start + count)[None]
            np.testing.assert_array_equal(read_rows(ring, rows, at, wanted)[0, :, 0], wanted[0])
        ring = write_ring(ring, rows, at)
        start += count
        history = list(range(max(0, start - slots), start))
        assert [float(ring[0, p % slots, 0]) for p in history] == history


def test_cache_sizes_are_what_the_layer_needs():
    """Window, compressor rings and entries by kind; drafts add slots to the rings alone."""
    config = ModelConfig.from_dict(PRESETS["flash"])
    shapes = lambda spec, drafts: jax.eval_shape(
        lambda: init_layer_cache(config, spec, 2, 8192, CacheFormat(jnp.bfloat16), drafts=drafts)
    )
    csa, hca = shapes(config.layers[2], 0), shapes(config.layers[3], 3)
    assert csa.window.shape == (2, 128, 512) and hca.window.shape == (2, 131, 512)
    assert csa.compressor.kv.shape == (2, 8, 1024) and csa.indexer.gate.shape == (2, 8, 256)
    assert csa.compressor.entries.shape == (2, 2048, 512) and csa.indexer.entries.shape == (2, 2048, 128)
    assert hca.compressor.kv.shape == (2, 131, 512) and hca.compressor.entries.shape == (2, 64, 512)
    assert csa.compressor.kv.dtype == jnp.float32 and csa.window.dtype == jnp.bfloat16
    assert shapes(config.layers[0], 0).compressor is None


@pytest.mark.parametrize(
    ("name", "form", "csa", "hca", "total", "windows", "state"),
    [
        ("flash", CacheFormat("fp8", "fp4"), 163.0, 4.5625, 3514.25, 3_289_088, 12_206_080),
        ("flash", CacheFormat("fp8", "fp8"), 179.0, 4.5625, 3850.25, 3_289_088, 12_206_080),
        ("flash", CacheFormat(jnp.bfloat16), 320.0, 8.0, 6880.0, 44 * 131_072, 12_206_080),
        ("pro", CacheFormat("fp8", "fp4"), 163.0, 4.5625, 5031.4375, 4_634_624, 18_710_528),
        ("pro", CacheFormat("fp8", "fp8"), 179.0, 4.5625, 5511.4375, 4_634_624, 18_710_528),
    ],
)
def test_bytes_per_sequence_are_the_published_ones(name, form, csa, hca, total, windows, state):
    sizes = cache_bytes(ModelConfig.from_dict(PRESETS[name]), form)
    assert sizes.per_token_of == {SLIDING: 0.0, CSA: csa, HCA: hca} and sizes.per_token == total
    assert sizes.windows == windows and sizes.compressor_state == state
