"""The portable implementations equal their references over shapes, pick kinds and edge cases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.experts import by_counting, expert_mlp, make_blocks
from dsv4_jax.numerics import ExactNumerics
from pallas_kernels.expert_rows import clamped_swiglu
from pallas_kernels.index_topk import pick_entries, pick_entries_xla
from pallas_kernels.index_topk.xla import kth_largest
from pallas_kernels.routing import compare_blocks
from pallas_kernels.sparse_mla import FirstN, Indices, Mask, Window, sparse_mla, sparse_mla_xla

D = 32


def attention_inputs(T: int, heads: int, kind: str, seed: int, *, band: bool, size: int = 16, N: int = 40, B: int = 2):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    start = rng.integers(0, 50, (B, 1))
    positions = jnp.asarray(start + np.arange(T), jnp.int32)
    if band:
        held = start - (size - 1) + np.arange(T + size - 1)
    else:  # a ring that has just been written
        last = start + T - 1
        held = last - (last - np.arange(T + size)) % (T + size)
    window = Window(normal(B, held.shape[1], D), jnp.asarray(held, jnp.int32), size, is_band=band)
    index = np.argsort(rng.random((B, T, N)), axis=-1)[..., :12]
    picks = {
        "none": None,
        "first": FirstN(jnp.asarray(rng.integers(0, N + 1, (B, T)))),
        "mask": Mask(jnp.asarray(rng.random((B, T, N)) < 0.3)),
        "indices": Indices(jnp.asarray(np.where(rng.random(index.shape) < 0.3, -1, index), jnp.int32)),
        "all -1": Indices(jnp.full(index.shape, -1, jnp.int32)),
    }[kind]
    entries = None if picks is None else normal(B, N, D)
    return normal(B, T, heads, D), positions, window, entries, picks, normal(heads)


@pytest.mark.parametrize("kind", ["none", "first", "mask", "indices", "all -1"])
@pytest.mark.parametrize(("T", "heads", "band"), [(1, 4, False), (3, 8, False), (5, 1, True), (64, 4, True),
                                                 (65, 8, True), (200, 2, True)])  # fmt: skip
def test_attention_equals_the_reference(T, heads, band, kind):
    inputs = attention_inputs(T, heads, kind, T + heads, band=band)
    want, got = (op(*inputs, scale=D**-0.5) for op in (sparse_mla, sparse_mla_xla))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_padded_heads_are_silent():
    q, positions, window, entries, picks, sinks = attention_inputs(5, 4, "indices", 0, band=True)
    want = sparse_mla_xla(q, positions, window, entries, picks, sinks, scale=0.2)
    wide = jnp.pad(q, ((0, 0), (0, 0), (0, 4), (0, 0)))
    silent = jnp.pad(sinks, (0, 4), constant_values=-jnp.inf)
    got = sparse_mla_xla(wide, positions, window, entries, picks, silent, scale=0.2)
    np.testing.assert_allclose(got[:, :, :4], want, atol=1e-6)
    assert jnp.isfinite(got).all()


@pytest.mark.parametrize("op", [sparse_mla, sparse_mla_xla])
def test_nothing_visible_gives_zeros(op):
    q = jnp.ones((1, 2, 3, D))
    window = Window(jnp.ones((1, 4, D)), jnp.full((1, 4), -1), 4)
    for sink in (0.0, -jnp.inf):
        assert (op(q, jnp.zeros((1, 2), int), window, None, None, jnp.full(3, sink), scale=1.0) == 0).all()


@pytest.mark.parametrize("op", [sparse_mla, sparse_mla_xla])
def test_entries_nobody_lists_may_hold_nan(op):
    q, positions, window, entries, picks, sinks = attention_inputs(5, 4, "indices", 3, band=True)
    listed = np.zeros(entries.shape[:2], bool)
    for b in range(len(listed)):
        listed[b, np.unique(np.asarray(picks.index[b]))[1:]] = True
    listed[:, 0] = True  # -1 reads row 0 before it is masked
    poisoned = jnp.where(jnp.asarray(listed)[..., None], entries, jnp.nan)
    want = op(q, positions, window, entries, picks, sinks, scale=0.2)
    np.testing.assert_array_equal(op(q, positions, window, poisoned, picks, sinks, scale=0.2), want)


def test_shapes_that_do_not_fit_are_refused():
    q, positions, window, entries, picks, sinks = attention_inputs(3, 4, "first", 0, band=True)
    with pytest.raises(ValueError, match="does not fit positions"):
        sparse_mla_xla(q, positions[:, :2], window, entries, picks, sinks, scale=1.0)
    with pytest.raises(ValueError, match="does not fit entries"):
        sparse_mla_xla(q, positions, window, None, picks, sinks, scale=1.0)


def selection(picks, N: int) -> np.ndarray:
    if isinstance(picks, Mask):
        return np.asarray(picks.mask)
    index = np.asarray(picks.index)
    out = np.zeros((*index.shape[:2], N + 1), bool)
    np.put_along_axis(out, index, True, axis=2)
    return out[..., :N]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("T", "N", "top_k"), [(1, 50, 8), (7, 20, 8), (33, 64, 16), (9, 200, 8), (4, 8, 8)])
def test_selection_equals_the_reference(T, N, top_k, ties, monkeypatch):
    monkeypatch.setattr("pallas_kernels.index_topk.xla.SCORE_BYTES", 4 * 2 * 4 * N * 5)  # five queries a block
    rng = np.random.default_rng(T + N)
    draw = lambda *s: jnp.asarray(rng.integers(-1, 2, s) if ties else rng.standard_normal(s), jnp.float32)
    q, weights, keys = draw(2, T, 4, 16), draw(2, T, 4), draw(2, N, 16)
    visible = jnp.asarray(rng.integers(0, N + 1, (2, T)), jnp.int32)
    want, got = (op(q, weights, keys, visible, top_k=top_k) for op in (pick_entries, pick_entries_xla))
    np.testing.assert_array_equal(selection(got, N), selection(want, N))
    assert (selection(got, N).sum(-1) == np.minimum(visible, top_k)).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([-np.inf, -2.5, -0.0, 0.0, 1e-30, 1.0, 3.0, 3.0000002, np.inf]), min_size=9, max_size=9)
)
def test_kth_largest_is_what_a_sort_finds(values):
    row, find = np.asarray(values, np.float32), jax.jit(kth_largest)
    for k in range(1, 10):
        assert float(find(jnp.asarray(row)[None], k)[0]) == np.sort(row)[::-1][k - 1]


def dense_experts(x, index, weights, gate_up, down, limit):
    out = np.zeros(x.shape, np.float64)
    for n, (experts, w) in enumerate(zip(np.asarray(index), np.asarray(weights), strict=True)):
        for e, weight in zip(experts, w, strict=True):
            hidden = clamped_swiglu(gate_up[e, 0] @ x[n], gate_up[e, 1] @ x[n], limit) * weight
            out[n] += np.asarray(down[e] @ hidden, np.float64)
    return out


@pytest.mark.parametrize(("n", "A", "E"), [(1, 2, 4), slow(3, 2, 16), (40, 2, 4), slow(64, 3, 5), slow(130, 1, 2)])
@pytest.mark.parametrize("skewed", [False, True])
def test_experts_equal_a_dense_loop(n, A, E, skewed):
    rng = np.random.default_rng(n)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    x, gate_up, down = normal(n, 16), normal(E, 2, 8, 16), normal(E, 16, 8)
    index = np.stack([np.arange(A) if skewed else rng.permutation(E)[:A] for _ in range(n)]).astype(np.int32)
    weights = jnp.asarray(rng.random((n, A)), jnp.float32)
    got = expert_mlp(x, jnp.asarray(index), weights, gate_up, down, 2.0, ExactNumerics())
    np.testing.assert_allclose(got, dense_experts(x, index, weights, gate_up, down, 2.0), atol=1e-4)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from([2, 4, 16]))
def test_blocks_hold_every_pair_once_and_one_expert_each(experts, rows):
    index = np.asarray(experts, np.int32)
    blocks = make_blocks(jnp.asarray(index), 6, rows)
    pair, P = np.asarray(blocks.pair), len(index)
    assert sorted(pair[pair < P]) == list(range(P))
    for block, expert in zip(pair, np.asarray(blocks.expert), strict=True):
        assert (index[block[block < P]] == expert).all()
    np.testing.assert_array_equal(pair.reshape(-1)[np.asarray(blocks.slot)], np.arange(P))
    assert (pair[int(blocks.used) :] == P).all()


def counted(index, experts, rows, multiple):
    return make_blocks(index, experts, rows, multiple, by_counting)


@pytest.mark.parametrize("make", [compare_blocks, counted])
@pytest.mark.parametrize("high", [1, 6, 9])
@pytest.mark.parametrize(("P", "rows", "multiple"), [(1, 1, 8), (48, 2, 1), (100, 4, 16), (1000, 4, 1)])
def test_blocks_are_those_of_sorted_pairs(P, rows, multiple, high, make):
    """Ids past the 6 experts are in no block."""
    index = np.random.default_rng(P).integers(0, high, P).astype(np.int32)
    want, got = (f(jnp.asarray(index), 6, rows, multiple) for f in (make_blocks, make))
    np.testing.assert_array_equal(got.pair, want.pair)
    np.testing.assert_array_equal(got.expert, want.expert)
    np.testing.assert_array_equal(got.slot[index < 6], want.slot[index < 6])
    assert got.used == want.used and (np.asarray(got.pair) < P).sum() == (index < 6).sum()
