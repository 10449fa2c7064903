"""The indexer's selection against its definition, written out in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.index_topk import index_scores, pick_entries, pick_entries_xla
from pallas_kernels.index_topk.xla import kth_largest
from pallas_kernels.sparse_mla import Mask

OPS = pytest.mark.parametrize("op", [pick_entries, pick_entries_xla])


def by_definition(q, weights, keys, visible, top_k: int) -> list[set[int]]:
    """Per query of row 0, the best of the visible entries; the lower index wins a tie."""
    dots = np.einsum("thd,nd->thn", *(np.asarray(x, np.float64)[0] for x in (q, keys)))
    scores = np.einsum("thn,th->tn", np.maximum(dots, 0), np.asarray(weights, np.float64)[0])
    order = [np.argsort(-row[:count], kind="stable") for row, count in zip(scores, np.asarray(visible)[0], strict=True)]
    return [set(best[:top_k].tolist()) for best in order]


def sets(picks) -> list[set[int]]:
    if isinstance(picks, Mask):
        return [set(np.flatnonzero(row).tolist()) for row in np.asarray(picks.mask)[0]]
    rows = np.asarray(picks.index)[0].tolist()
    assert all(len(set(row) - {-1}) == len([i for i in row if i >= 0]) for row in rows)  # none twice
    return [set(row) - {-1} for row in rows]


@OPS
@pytest.mark.parametrize("values", ["real", "few integers"])
@pytest.mark.parametrize(("T", "N", "top_k"), [(1, 60, 7), (6, 24, 7), (6, 60, 7), (40, 28, 7), (3, 9, 9)])
def test_equals_the_definition(op, T, N, top_k, values):
    rng = np.random.default_rng(T * N)
    draw = lambda *s: rng.standard_normal(s) if values == "real" else rng.integers(-1, 2, s)
    q, weights, keys = (jnp.asarray(draw(*s), jnp.float32) for s in ((1, T, 3, 8), (1, T, 3), (1, N, 8)))
    visible = jnp.asarray(np.minimum(rng.integers(0, N + 1, (1, T)) + (np.arange(T) % 2) * N, N), jnp.int32)
    assert sets(op(q, weights, keys, visible, top_k=top_k)) == by_definition(q, weights, keys, visible, top_k)


@OPS
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("weight", [-1.0, 1.0])
def test_scores_that_all_vanish_tie_and_the_first_entries_win(op, T, weight):
    """relu leaves nothing of any product, so every score is zero: minus zero under a negative weight."""
    q, keys = jnp.ones((1, T, 2, 4)), -jnp.ones((1, 12, 4))
    picks = op(q, jnp.full((1, T, 2), weight), keys, jnp.full((1, T), 12), top_k=3)
    assert sets(picks) == [{0, 1, 2}] * T


def test_relu_comes_before_the_weight():
    q, keys = jnp.ones((1, 1, 2, 1)), jnp.asarray([[[2.0], [-3.0]]])
    scores = index_scores(q, jnp.asarray([[[-1.0, 0.25]]]), keys)
    np.testing.assert_array_equal(scores, [[[-1.5, 0.0]]])


@OPS
@pytest.mark.parametrize("T", [1, 5])
def test_entries_past_the_visible_ones_do_not_matter(op, T):
    rng = np.random.default_rng(T)
    q, weights, keys = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1, T, 3, 8), (1, T, 3), (1, 30, 8)))
    visible = jnp.full((1, T), 11)
    want = sets(op(q, weights, keys, visible, top_k=4))
    assert sets(op(q, weights, keys.at[:, 11:].set(1e3), visible, top_k=4)) == want
    assert all(len(row) == 4 and max(row) < 11 for row in want)


@OPS
@pytest.mark.parametrize("T", [1, 5])
def test_fewer_visible_than_wanted_are_all_picked(op, T):
    q, weights, keys = jnp.ones((1, T, 1, 2)), jnp.ones((1, T, 1)), jnp.ones((1, 20, 2))
    assert sets(op(q, weights, keys, jnp.full((1, T), 3), top_k=8)) == [{0, 1, 2}] * T
    assert sets(op(q, weights, keys, jnp.zeros((1, T), jnp.int32), top_k=8)) == [set()] * T


def test_kth_largest_row_by_row():
    x = np.random.default_rng(0).standard_normal((3, 4, 100)).astype(np.float32)
    for k in (1, 2, 50, 100):
        np.testing.assert_array_equal(kth_largest(jnp.asarray(x), k), np.sort(x)[..., -k])


def test_fewer_entries_than_picks():
    got = pick_entries_xla(
        jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1, 1)), jnp.ones((1, 6, 4)), jnp.asarray([[4]]), top_k=8
    )
    assert got.index.tolist() == [[[0, 1, 2, 3, -1, -1]]]
