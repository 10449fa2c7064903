"""What lies between and behind the products of experts, for TPU, in the strict interpreter: bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.expert_rows import add_rows, add_rows_tpu, expert_hidden, expert_hidden_tpu

V6E = chip("v6e")
STRICT = pltpu.InterpretParams()
LIMIT = 10.0


def same(want, got):
    assert want.shape == got.shape and want.dtype == got.dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def draw(rows: int, F: int, dtype):
    rng = np.random.default_rng((rows, F))
    both = rng.standard_normal((rows, 2 * F)) * 2.0 ** rng.integers(-8, 6, (rows, 2 * F))  # beyond the limit, too
    return jnp.asarray(both, dtype), jnp.asarray(rng.random((rows, 1)), jnp.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "F", "dtype"), [(1, 256, "bfloat16"), (96, 2048, "bfloat16"), (140, 384, "float32")])
def test_hidden_equals_the_reference(rows, F, dtype, weighted, rounded):
    both, weight = draw(rows, F, dtype)
    args, options = (both, weight) if weighted else (both,), {"limit": LIMIT, "rounded": rounded}
    want, got = expert_hidden(*args, **options), expert_hidden_tpu(*args, **options, chip=V6E, interpret=STRICT)
    if rounded or dtype == "bfloat16":
        same(want, got)
    else:  # the interpreter may join a product and a sum
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.interpreter
def test_rows_of_no_weight_may_hold_anything():
    both, weight = draw(8, 128, "bfloat16")
    both, weight = both.at[3].set(jnp.nan), weight.at[3].set(0)
    for rounded in (False, True):
        want = expert_hidden(both, weight, limit=LIMIT, rounded=rounded)
        same(want, expert_hidden_tpu(both, weight, limit=LIMIT, rounded=rounded, chip=V6E, interpret=STRICT))
        assert (want[3] == 0).all() and jnp.isfinite(want).all()
    slope = jax.grad(lambda both: expert_hidden(both, weight, limit=LIMIT, rounded=False).sum())(both)
    assert jnp.isfinite(slope).all()


def test_leading_axes():
    both, weight = (a.reshape(2, 3, -1) for a in draw(6, 128, "bfloat16"))
    got = expert_hidden_tpu(both, weight, limit=LIMIT, rounded=True, chip=V6E, interpret=True)
    same(expert_hidden(both, weight, limit=LIMIT, rounded=True), got)


@pytest.mark.interpreter
@pytest.mark.parametrize(("S", "M", "n", "A", "dtype"), [(96, 1024, 8, 6, "bfloat16"), (7, 384, 3, 2, "float32")])
def test_rows_are_added_in_order(S, M, n, A, dtype):
    """What nobody reads is poison; places below zero are nothing."""
    rng = np.random.default_rng(S)
    used = S // 2
    products = jnp.asarray(rng.standard_normal((S, M)) * 2.0 ** rng.integers(-9, 9, (S, 1)), dtype)
    place = jnp.asarray(rng.integers(-1, used, (n, A)), jnp.int32).at[0].set(-1)
    got = add_rows_tpu(products.at[used:].set(jnp.nan), place, chip=V6E, interpret=STRICT)
    want = np.zeros((n, M), np.float32)
    for a in range(A):
        terms = np.asarray(products, np.float32)[np.maximum(place[:, a], 0)]
        want += np.where(place[:, a, None] >= 0, terms, np.float32(0))
    np.testing.assert_array_equal(got, want)
    same(add_rows(products, place), got)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="100 channels are no multiple of 128; use the jnp op"):
        expert_hidden_tpu(jnp.ones((2, 200)), limit=LIMIT, rounded=True, chip=V6E)
    with pytest.raises(ValueError, match="v5e, v5p, v6e, v7x"):
        expert_hidden_tpu(jnp.ones((2, 256)), limit=LIMIT, rounded=True, chip=chip("H100"))
    with pytest.raises(ValueError, match="use the jnp op"):
        add_rows_tpu(jnp.ones((4, 100)), jnp.zeros((2, 2), jnp.int32), chip=V6E)
    with pytest.raises(ValueError, match="too many"):
        add_rows_tpu(jax.eval_shape(lambda: jnp.ones((1 << 15, 128))), jnp.zeros((2, 2), jnp.int32), chip=V6E)


def make_hidden(target, rows: int, F: int, weighted: bool):
    run = lambda *args: expert_hidden_tpu(*args, limit=LIMIT, rounded=True, chip=target)
    args = jax.ShapeDtypeStruct((rows, 2 * F), jnp.bfloat16), jax.ShapeDtypeStruct((rows, 1), jnp.float32)
    return run, args[: 1 + weighted]


def make_sums(target, S: int, M: int, n: int):
    args = jax.ShapeDtypeStruct((S, M), jnp.bfloat16), jax.ShapeDtypeStruct((n, 6), jnp.int32)
    return lambda *args: add_rows_tpu(*args, chip=target), args


AOT_CASES = [
    ("make_hidden", {"rows": rows, "F": F, "weighted": weighted})
    for rows, F, weighted in ((1, 2048, False), (6, 3072, True), (96, 2048, True), (4096, 3072, True))
]
AOT_CASES += [("make_sums", {"S": S, "M": M, "n": n}) for S, M, n in ((6, 4096, 1), (96, 4096, 8), (1536, 7168, 85))]


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    for report in aot.run_cases([aot.Case(f"{__file__}:{make}", case) for make, case in AOT_CASES], name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 1, report
