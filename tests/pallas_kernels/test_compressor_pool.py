"""A compressor's pooling for TPU against its reference, and that against the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.compressor_pool import pool_window, pool_window_tpu

V6E = chip("v6e")
STRICT = pltpu.InterpretParams()


def make_rings(start, end, R: int, W: int, ratio: int, overlap: bool, seed=0):
    """Rings that hold what the entries need, NaN elsewhere, and the entries by definition, zeros if there is none."""
    rng = np.random.default_rng(seed)
    D, rings = W // (1 + overlap), np.full((2, len(start), R, W), np.nan, np.float32)
    entries = np.zeros((len(start), D))
    for b, (a, z) in enumerate(zip(start, end, strict=True)):
        first = a // ratio * ratio
        if first + ratio > z:
            continue
        used = [(p, slice(W - D, W)) for p in range(first, first + ratio)]
        used += [(p, slice(0, D)) for p in range(max(first - ratio, 0), first) if overlap]
        assert all(z - R <= p < z for p, _ in used)
        rows, gates = rng.normal(size=(2, len(used), D)) * np.float32([1, 4])[:, None, None]
        for (p, half), row, gate in zip(used, rows, gates, strict=True):
            rings[0, b, p % R, half], rings[1, b, p % R, half] = row, gate
        rows, gates = rows.astype(np.float32).astype(float), gates.astype(np.float32).astype(float)
        weights = np.exp(gates - gates.max(0))
        entries[b] = (weights * rows).sum(0) / weights.sum(0)
    return jnp.asarray(rings[0]), jnp.asarray(rings[1]), entries


CASES = {
    "csa": (4, True, 0, 256, (0, 3, 4, 7, 9, 1023, 32763, 1 << 20), (1,) * 8),
    "csa, one row at the end of two": (4, True, 1, 512, (3, 2, 3, 6, 7, 11), (1, 2, 2, 2, 0, 1)),
    "csa, drafts": (4, True, 3, 256, (0, 1, 1, 3, 5, 70, 71, 64, 1001), (4, 3, 2, 4, 3, 4, 1, 3, 4)),
    "hca": (128, False, 0, 256, (127, 126, 255, 1279, 5), (1,) * 5),
    "hca, drafts": (128, False, 2, 128, (127, 126, 125, 254, 383), (3, 3, 2, 2, 0)),
    "nothing is complete": (4, True, 0, 256, (0, 1, 2, 4), (1,) * 4),
    "a ratio of 8, more rows than a block has": (8, False, 0, 128, tuple(range(24)), (1,) * 24),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_and_the_definition(name, dtype):
    """What the rings hold beside the rows of an entry is NaN."""
    ratio, overlap, drafts, W, start, count = CASES[name]
    end = np.add(start, count)
    kv, gate, entries = make_rings(start, end, ratio * (1 + overlap) + drafts, W, ratio, overlap)
    args = kv, gate, jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)
    options = {"ratio": ratio, "overlap": overlap, "dtype": jnp.dtype(dtype)}
    want, got = pool_window(*args, **options), pool_window_tpu(*args, **options, chip=V6E, interpret=STRICT)
    assert want.dtype == got.dtype == dtype
    close = {"rtol": 2**-7, "atol": 1e-6} if dtype == "bfloat16" else {"rtol": 2e-6, "atol": 2e-6}
    for x in (want, got):
        np.testing.assert_allclose(np.asarray(x, float), entries, **close)
    np.testing.assert_allclose(np.asarray(got, float), np.asarray(want, float), **close)


def test_gradients_are_finite_and_reach_nothing_else():
    start, end = jnp.array([3, 4]), jnp.array([4, 5])
    kv, gate, _ = make_rings((3, 4), (4, 5), 8, 256, 4, True)
    loss = lambda *rings: jnp.square(pool_window(*rings, start, end, ratio=4, overlap=True, dtype=jnp.float32)).sum()
    for g in jax.grad(loss, (0, 1))(kv, gate):
        assert jnp.isfinite(g).all() and (g[0, :4, 128:] != 0).any()
        assert not g[1].any() and not g[0, 4:].any() and not g[0, :, :128].any()


def test_what_does_not_fit_is_refused():
    rings, at = (jnp.ones((2, 8, 256)),) * 2, (jnp.zeros(2, jnp.int32),) * 2
    options = {"ratio": 4, "overlap": True, "dtype": jnp.float32, "chip": V6E}
    with pytest.raises(ValueError, match="100 channels are no multiple of 128; use the jnp op"):
        pool_window_tpu(*(x[..., :200] for x in rings), *at, **options)
    with pytest.raises(ValueError, match="do not fit rows"):
        pool_window_tpu(*rings, at[0][:1], at[1], **options)
    with pytest.raises(ValueError, match="not float32"):
        pool_window_tpu(*(x.astype(jnp.bfloat16) for x in rings), *at, **options)
    with pytest.raises(ValueError, match="do not hold windows of 5 rows twice"):
        pool_window_tpu(*rings, *at, **options | {"ratio": 5})
    with pytest.raises(ValueError, match="v5e, v5p, v6e, v7x"):
        pool_window_tpu(*rings, *at, **options | {"chip": chip("H100")})


def make_case(target, B: int, ratio: int, D: int, drafts: int):
    overlap = ratio == 4
    ring = jax.ShapeDtypeStruct((B, ratio * (1 + overlap) + drafts, D * (1 + overlap)), jnp.float32)
    at = jax.ShapeDtypeStruct((B,), jnp.int32)
    run = lambda *args: pool_window_tpu(*args, ratio=ratio, overlap=overlap, dtype=jnp.bfloat16, chip=target)
    return run, (ring, ring, at, at)


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    """Flash and Pro pool the same rows: of CSA, its indexer and HCA."""
    kinds = [(4, 512), (4, 128), (128, 512)]
    sizes = [(B, drafts) for B in (1, 8, 64) for drafts in (0, 1, 3)] + [(7, 0), (13, 0)]
    cases = [{"B": B, "ratio": ratio, "D": D, "drafts": n} for B, n in sizes for ratio, D in kinds]
    for report in aot.run_cases([aot.Case(f"{__file__}:make_case", case) for case in cases], name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 1, report
