"""Routing for TPU, in the strict interpreter: the same ids and rows as the reference gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.experts import block_rows, make_blocks, slab_blocks
from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.routing import arrange_pairs, arrange_pairs_tpu, route, route_tpu

V6E = chip("v6e")
STRICT = pltpu.InterpretParams()
FACTOR = 1.5


def same(want, got):
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.interpreter
@pytest.mark.parametrize(("n", "E", "A"), [(1, 8, 8), (8, 256, 6), (5, 6, 2), (130, 384, 6)])
def test_route_equals_the_reference(n, E, A):
    """Scores of few values, so that there are many ties."""
    rng = np.random.default_rng(n)
    scores = jnp.asarray(rng.integers(1, 9, (n, E)) / 7, jnp.float32)
    bias = jnp.asarray(rng.integers(-3, 4, E) / 7, jnp.float32)
    options = {"top_k": A, "factor": FACTOR}
    want, got = route(scores, bias, **options), route_tpu(scores, bias, **options, chip=V6E, interpret=STRICT)
    np.testing.assert_array_equal(want[0], got[0])
    np.testing.assert_allclose(want[1], got[1], rtol=1e-6)


@pytest.mark.interpreter
def test_route_keeps_to_the_experts_there_are_whatever_they_score():
    """NaN comes first, as in `top_k`, and spoils its own token only; biases of -inf come last, the lower id first."""
    scores = jnp.ones((3, 8), jnp.float32).at[0, 5].set(jnp.nan)
    bias = jnp.full(8, -jnp.inf).at[jnp.array([3, 6])].set(0)
    want, got = (f(scores, bias, top_k=4, factor=1.0) for f in (route, lambda *a, **k: kernel(route_tpu, *a, **k)))
    np.testing.assert_array_equal(got[0], [[5, 3, 6, 0], [3, 6, 0, 1], [3, 6, 0, 1]])
    np.testing.assert_array_equal(want[0][1:], got[0][1:])
    np.testing.assert_array_equal(got[1][1:], 0.25)
    assert jnp.isnan(got[1][0]).all()


def kernel(call, *args, **options):
    return call(*args, **options, chip=V6E, interpret=STRICT)


def pairs(n: int, A: int, experts: int, held: int, seed: int = 0):
    rng = np.random.default_rng((n, experts, seed))
    index = np.stack([rng.permutation(experts)[:A] for _ in range(n)])
    return jnp.asarray(np.minimum(index, held), jnp.int32), jnp.asarray(rng.random((n, A)), jnp.float32)


# tokens, choices, experts there are, of which so many are held, rows of a block
ARRANGED = [
    (8, 6, 32, 32, 2),
    (8, 6, 256, 256, 1),
    (1, 6, 256, 32, 1),
    (5, 2, 6, 6, 2),
    (24, 6, 8, 3, 32),
    (85, 6, 256, 64, 2),
    (64, 6, 8, 8, 64),
]


@pytest.mark.interpreter
@pytest.mark.parametrize(("n", "A", "experts", "held", "rows"), ARRANGED)
def test_pairs_are_arranged_as_by_the_reference(n, A, experts, held, rows):
    index, weights = pairs(n, A, experts, held)
    options = {"experts": held, "rows": rows, "multiple": slab_blocks(n, A, held, experts, rows)}
    want = arrange_pairs(index, weights, **options)
    same(want, kernel(arrange_pairs_tpu, index, weights, **options))
    same(want, arrange_pairs(index, weights, **options, make=make_blocks))


@pytest.mark.interpreter
@pytest.mark.parametrize("chosen", [0, 2, 3])
def test_all_pairs_of_one_expert_and_equal_choices(chosen):
    """Of 3 experts that are held, or of one held elsewhere."""
    index, weights = jnp.full((7, 4), chosen, jnp.int32), jnp.arange(28, dtype=jnp.float32).reshape(7, 4)
    options = {"experts": 3, "rows": 4, "multiple": 4}
    got = kernel(arrange_pairs_tpu, index, weights, **options)
    same(arrange_pairs(index, weights, **options), got)
    assert got.used == (0 if chosen == 3 else 7)


@pytest.mark.interpreter
def test_every_pair_has_its_row():
    index, weights = pairs(20, 6, 16, 12)
    rows = block_rows(120, 16)
    got = kernel(arrange_pairs_tpu, index, weights, experts=12, rows=rows, multiple=1)
    place, ids = np.asarray(got.place), np.sort(index, axis=1)
    here = ids < 12
    np.testing.assert_array_equal(place >= 0, here)
    assert len(set(place[here])) == here.sum() == (np.asarray(got.token) < 20).sum()
    np.testing.assert_array_equal(
        np.asarray(got.token)[place[here]], np.broadcast_to(np.arange(20)[:, None], (20, 6))[here]
    )
    np.testing.assert_array_equal(np.asarray(got.expert)[place[here] // rows], ids[here])
    sums = np.zeros(20)
    np.add.at(sums, np.asarray(got.token)[place[here]], np.asarray(got.weight)[place[here], 0])
    np.testing.assert_allclose(sums, np.where(index < 12, weights, 0).sum(1), rtol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="v5e, v5p, v6e, v7x"):
        route_tpu(jnp.ones((2, 8)), jnp.ones(8), top_k=2, factor=1.0, chip=chip("H100"))
    with pytest.raises(ValueError, match="float32 of as many experts, 9 at least"):
        route_tpu(jnp.ones((2, 8)), jnp.ones(8), top_k=9, factor=1.0, chip=V6E)
    with pytest.raises(ValueError, match="at most 512 and a power of two, or use the jnp op"):
        arrange_pairs_tpu(*pairs(86, 6, 8, 8), experts=8, rows=2, chip=V6E)
    with pytest.raises(ValueError, match="blocks of 3 rows"):
        arrange_pairs_tpu(*pairs(8, 6, 8, 8), experts=8, rows=3, chip=V6E)


def make_route(target, n: int, E: int):
    array = jax.ShapeDtypeStruct
    run = lambda *args: route_tpu(*args, top_k=6, factor=FACTOR, chip=target)
    return run, (array((n, E), jnp.float32), array((E,), jnp.float32))


def make_arranged(target, n: int, experts: int, held: int):
    rows = block_rows(6 * n, experts)
    options = {"experts": held, "rows": rows, "multiple": slab_blocks(n, 6, held, experts, rows)}
    run = lambda *args: arrange_pairs_tpu(*args, **options, chip=target)
    return run, tuple(jax.ShapeDtypeStruct((n, 6), dtype) for dtype in (jnp.int32, jnp.float32))


AOT_CASES = [("make_route", {"n": n, "E": E}) for n, E in ((1, 256), (8, 384), (2048, 256))]
AOT_CASES += [
    ("make_arranged", {"n": n, "experts": experts, "held": held})
    for n, experts, held in ((1, 256, 256), (8, 256, 32), (85, 384, 24), (85, 256, 256), (64, 8, 8))
]


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    for report in aot.run_cases([aot.Case(f"{__file__}:{make}", case) for make, case in AOT_CASES], name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 1, report
