"""KV rows on their way into the 8-bit cache on TPU, in the strict interpreter, against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.kv_rows import dequantize_rows
from pallas_kernels.store_rows import store_rows, store_rows_tpu

V6E = chip("v6e")
EPS = 1e-6
STRICT = pltpu.InterpretParams()


def draw(B, T, D, R, dtype, seed=0):
    rng = np.random.default_rng((seed, B, T, D))
    angle = rng.uniform(-9, 9, (B, T, R // 2))
    rows = rng.standard_normal((B, T, D)) * 2.0 ** rng.integers(-6, 6, (B, T, D))
    weight = rng.uniform(0.1, 3, D)
    weight[: D // 8] *= 1e-9  # groups below the least scale
    tables = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    return jnp.asarray(rows, dtype), jnp.asarray(weight, jnp.float32), *tables


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("B", "T", "D", "R", "dtype"),
    [
        (2, 1, 512, 64, "bfloat16"),
        (8, 3, 512, 64, "bfloat16"),
        (1, 150, 512, 64, "bfloat16"),  # two tiles, the second cut
        (3, 1, 128, 64, "bfloat16"),  # as many channels turn as stay
        (2, 5, 256, 128, "float32"),
    ],
)
def test_equals_the_reference(B, T, D, R, dtype):
    args = draw(B, T, D, R, dtype)
    want, got = store_rows(*args, eps=EPS), store_rows_tpu(*args, eps=EPS, chip=V6E, interpret=STRICT)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    # The order of a sum may tip a rounding of the norm, and that a code: seldom, and by one step of either.
    same = np.mean(np.asarray(got.codes, np.float32) == np.asarray(want.codes, np.float32))
    assert same > 0.98, same
    np.testing.assert_array_equal(got.scales, want.scales)
    np.testing.assert_allclose(*(np.asarray(x.rope, np.float32) for x in (got, want)), rtol=2**-6, atol=2**-8)
    np.testing.assert_allclose(*(dequantize_rows(x, jnp.float32) for x in (got, want)), rtol=0.14, atol=2**-8)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("B", "T", "D", "R", "dtype"),
    [
        (2, 1, 512, 64, "bfloat16"),
        (1, 150, 512, 64, "bfloat16"),
        (3, 1, 128, 64, "bfloat16"),
        (2, 5, 256, 128, "float32"),
    ],
)
def test_wide_rows_are_what_the_codes_stand_for(B, T, D, R, dtype):
    args = draw(B, T, D, R, dtype)
    got = store_rows_tpu(*args, eps=EPS, wide=True, chip=V6E, interpret=STRICT)
    coded = store_rows_tpu(*args, eps=EPS, chip=V6E, interpret=STRICT)
    assert got.shape == (B, T, D) and got.dtype == dtype
    np.testing.assert_array_equal(got[..., :-R], dequantize_rows(coded, got.dtype)[..., :-R])
    np.testing.assert_array_equal(got[..., -R:].astype(jnp.bfloat16), coded.rope)
    want = store_rows(*args, eps=EPS, wide=True)
    np.testing.assert_array_equal(want[..., :-R], dequantize_rows(store_rows(*args, eps=EPS), got.dtype)[..., :-R])
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), rtol=0.14, atol=2**-8)


@pytest.mark.interpreter
def test_codes_are_exact_where_the_norm_is():
    """Rows of a mean square of one whatever the order of the sum: codes, scales and rotary channels bit for bit."""
    rng = np.random.default_rng(3)
    rows = jnp.asarray(rng.choice([-1.0, 1.0], (4, 2, 512)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal(512) * 2.0 ** rng.integers(-8, 8, 512), jnp.float32)
    args = rows, weight, jnp.ones((4, 2, 32)), jnp.zeros((4, 2, 32))
    want, got = store_rows(*args, eps=0.0), store_rows_tpu(*args, eps=0.0, chip=V6E, interpret=STRICT)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(theirs, np.float32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chip": chip("H100")}, "v5e, v5p, v6e, v7x"),
        ({"rows": jnp.ones((2, 1, 96)), "weight": jnp.ones((96,))}, "use the jnp op"),
        ({"cos": jnp.ones((2, 1, 16))}, "do not fit rows"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    given = dict(zip(("rows", "weight", "cos", "sin"), draw(2, 1, 128, 64, "bfloat16"), strict=True))
    options = {"chip": V6E} | given | change
    args = [options.pop(name) for name in given]
    with pytest.raises(ValueError, match=words):
        store_rows_tpu(*args, eps=EPS, **options)


def make_case(target, B: int, T: int, wide: bool = False):
    array = jax.ShapeDtypeStruct
    table = array((B, T, 32), jnp.float32)
    run = lambda *args: store_rows_tpu(*args, eps=EPS, wide=wide, chip=target)
    return run, (array((B, T, 512), jnp.bfloat16), array((512,), jnp.float32), table, table)


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    cases = [{"B": B, "T": T} for B, T in [(1, 1), (8, 1), (64, 1), (3, 5), (1, 2048)]]
    cases += [{"B": B, "T": T, "wide": True} for B, T in [(1, 1), (64, 1), (1, 2048)]]
    for report in aot.run_cases([aot.Case(f"{__file__}:make_case", case) for case in cases], name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 1, report
