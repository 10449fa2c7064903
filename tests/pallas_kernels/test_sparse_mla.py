"""Sparse MLA against its definition, written out in float64 for one query and head at a time."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_mla import FirstN, Indices, Mask, Window, sparse_mla, sparse_mla_xla

SIZE, D, H, N, SCALE = 6, 16, 3, 20, 0.3
OPS = pytest.mark.parametrize("op", [sparse_mla, sparse_mla_xla])


def by_definition(q, positions, rows, row_positions, entries, picked, sinks) -> np.ndarray:
    """picked[b][t]: the entries of a query."""
    q, rows, entries, sinks = (np.asarray(x, np.float64) for x in (q, rows, entries, sinks))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        p = positions[b, t]
        seen = [row for row, at in zip(rows[b], row_positions[b], strict=True) if at >= 0 and p - SIZE < at <= p]
        keys = np.asarray(seen + [entries[b, i] for i in picked[b][t]]).reshape(-1, D)
        weights = np.exp(keys @ q[b, t, h] * SCALE)
        out[b, t, h] = weights @ keys / (weights.sum() + np.exp(sinks[h]))
    return out


def band(starts: np.ndarray, T: int) -> np.ndarray:
    """Row t + SIZE - 1 is that of query t; before the sequence there is nothing."""
    return starts[:, None] - (SIZE - 1) + np.arange(T + SIZE - 1)


def ring(starts: np.ndarray, T: int, slack: int = 3) -> np.ndarray:
    """Position p in slot p % slots, the newest ones; later than the queries where drafts were rejected."""
    slots = SIZE + T + slack
    newest = starts[:, None] + T  # one past the last query
    return newest - (newest - np.arange(slots)) % slots


@OPS
@pytest.mark.parametrize("kind", ["first", "indices", "mask"])
@pytest.mark.parametrize(("layout", "T"), [("ring", 1), ("ring", 4), ("band", 7), ("band", 65)])
def test_equals_the_definition(op, layout, T, kind):
    rng = np.random.default_rng(T)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    starts = np.asarray([0, 2, 50])  # the beginning, less than a window in, far in
    held = (band if layout == "band" else ring)(starts, T)
    q, rows, entries, sinks = normal(3, T, H, D), normal(3, held.shape[1], D), normal(3, N, D), normal(H)
    positions = starts[:, None] + np.arange(T)
    counts = rng.integers(0, 9, (3, T))
    listed = np.argsort(rng.random((3, T, N)), axis=-1)
    picked = [[range(c) if kind == "first" else listed[b, t, :c] for t, c in enumerate(counts[b])] for b in range(3)]
    if kind == "first":
        picks = FirstN(jnp.asarray(counts))
    elif kind == "indices":  # empty places before the picks, too
        picks = Indices(jnp.asarray(np.where(np.arange(8) >= 8 - counts[..., None], listed[..., :8], -1), jnp.int32))
        picked = [[listed[b, t, 8 - c : 8] for t, c in enumerate(counts[b])] for b in range(3)]
    else:
        mask = np.zeros((3, T, N), bool)
        for b, t in np.ndindex(3, T):
            mask[b, t, picked[b][t]] = True
        picks = Mask(jnp.asarray(mask))
    window = Window(jnp.asarray(rows), jnp.asarray(held, jnp.int32), SIZE, is_band=layout == "band")
    args = (jnp.asarray(q), jnp.asarray(positions, jnp.int32), window, jnp.asarray(entries), picks, jnp.asarray(sinks))
    want = by_definition(q, positions, rows, held, entries, picked, sinks)
    np.testing.assert_allclose(op(*args, scale=SCALE), want, rtol=0, atol=2e-6 * np.abs(want).max())


def alone(distance: int, op) -> bool:
    """Does a query see a window row that is `distance` positions back?"""
    window = Window(jnp.ones((1, 1, D)), jnp.asarray([[40 - distance]]), SIZE)
    out = op(jnp.ones((1, 1, 1, D)), jnp.asarray([[40]]), window, None, None, jnp.zeros(1), scale=1.0)
    return bool((out != 0).all())


@OPS
def test_a_window_holds_the_query_itself_and_the_rows_before_it(op):
    assert [distance for distance in range(-3, SIZE + 3) if alone(distance, op)] == list(range(SIZE))


@OPS
def test_the_sink_takes_weight_and_is_not_scaled(op):
    window = Window(jnp.ones((1, 1, D)), jnp.zeros((1, 1), jnp.int32), SIZE)
    sinks = jnp.asarray([-jnp.inf, 0.0, 2.0])
    out = op(jnp.zeros((1, 1, 3, D)), jnp.zeros((1, 1), jnp.int32), window, None, None, sinks, scale=1e-3)
    np.testing.assert_allclose(out[0, 0, :, 0], [1, 0.5, 1 / (1 + np.e**2)], rtol=1e-6)


@OPS
def test_large_scores_do_not_overflow(op):
    rows = jnp.stack([jnp.full(D, 1.0), jnp.full(D, 2.0)])[None]
    window = Window(rows, jnp.asarray([[0, 1]]), SIZE)
    out = op(jnp.full((1, 1, 1, D), 100.0), jnp.asarray([[1]]), window, None, None, jnp.zeros(1), scale=1.0)
    np.testing.assert_array_equal(out, jnp.full((1, 1, 1, D), 2.0))


@OPS
def test_bfloat16_in_bfloat16_out(op):
    rng = np.random.default_rng(0)
    q, rows = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((1, 9, H, D), (1, 9 + SIZE - 1, D)))
    held = jnp.asarray(band(np.asarray([30]), 9), jnp.int32)
    positions, sinks = jnp.arange(30, 39)[None], jnp.zeros(H)
    out = op(q, positions, Window(rows, held, SIZE, is_band=True), None, None, sinks, scale=SCALE)
    assert out.dtype == jnp.bfloat16
    nothing = [[[]] * 9]
    want = by_definition(q, np.asarray(positions), rows, np.asarray(held), np.zeros((1, 1, D)), nothing, sinks)
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=0, atol=2**-7 * np.abs(want).max())
