"""Rounded index queries for TPU, in the strict interpreter, against the reference.

The transform's sums have another order: with whole numbers the two agree bit for bit, else a rounding may tip.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.round_index import round_index, round_index_tpu

V6E = chip("v6e")
STRICT = pltpu.InterpretParams()


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 128), (2, 3, 5, 128), (64, 128), (100, 128), (2, 9, 64, 128)])
def test_equals_the_reference(shape, dtype):
    rng = np.random.default_rng(len(shape))
    whole = rng.integers(-8, 9, shape) * 2.0 ** rng.integers(-9, 9, (*shape[:-1], 1))
    for x, tipped in ((whole, 0.0), (rng.standard_normal(shape), 2e-3)):
        x = jnp.asarray(x, dtype)
        got = round_index_tpu(x, chip=V6E, interpret=STRICT)
        assert got.dtype == x.dtype and got.shape == x.shape
        got, want = (np.asarray(a, np.float32) for a in (got, round_index(x)))
        assert (got != want).mean() <= tipped
        np.testing.assert_allclose(got, want, atol=0.5 * np.abs(want).max())


@pytest.mark.interpreter
def test_zeros_stay_and_a_constant_is_one_channel():
    x = jnp.zeros((2, 128), jnp.bfloat16).at[1].set(3)
    got = round_index_tpu(x, chip=V6E, interpret=STRICT).astype(jnp.float32)
    assert (got[0] == 0).all() and (got[1, 1:] == 0).all()
    assert abs(got[1, 0] / (3 * 128**0.5) - 1) < 0.2  # to one bit of mantissa


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="use the jnp op"):
        round_index_tpu(jnp.ones((2, 64)), chip=V6E)
    with pytest.raises(ValueError, match="v5e, v5p, v6e, v7x"):
        round_index_tpu(jnp.ones((2, 128)), chip=chip("H100"))


def make_case(target, rows: int):
    run = lambda x: round_index_tpu(x, chip=target)
    return run, (jax.ShapeDtypeStruct((rows, 128), jnp.bfloat16),)


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    cases = [{"rows": rows} for rows in (1, 64, 512, 2048 * 64)]
    for report in aot.run_cases([aot.Case(f"{__file__}:make_case", case) for case in cases], name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 1, report
