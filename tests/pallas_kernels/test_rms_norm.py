"""The norm for TPU, in the strict interpreter, against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.rms_norm import rms_norm, rms_norm_tpu

V6E = chip("v6e")
EPS = 1e-6
STRICT = pltpu.InterpretParams()


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 128), (2, 1, 4096), (5, 3, 384), (300, 1024)])
def test_equals_the_reference(shape, dtype):
    rng = np.random.default_rng(shape[0])
    x = jnp.asarray(rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 9, (*shape[:-1], 1)), dtype)
    weight = jnp.asarray(rng.standard_normal(shape[-1:]), jnp.float32)
    want, got = rms_norm(x, weight, eps=EPS), rms_norm_tpu(x, weight, eps=EPS, chip=V6E, interpret=STRICT)
    assert got.shape == want.shape and got.dtype == want.dtype
    rounding = 2.0**-7 if dtype == "bfloat16" else 1e-6  # sums in another order may tip a rounding
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), rtol=rounding)


def test_reference_on_a_row_by_hand():
    """The mean square of 1 and 7 is 25."""
    got = rms_norm(jnp.asarray([1.0, 7.0]), jnp.asarray([5.0, 10.0]), eps=0.0)
    np.testing.assert_allclose(got, [1, 14], rtol=1e-6)


def test_what_does_not_fit_is_refused():
    for x, weight, target, words in [
        ((2, 100), 100, "v6e", "use the jnp op"),
        ((2, 128), 64, "v6e", "does not fit x"),
        ((2, 128), 128, "H100", "v5e, v5p, v6e, v7x"),
    ]:
        with pytest.raises(ValueError, match=words):
            rms_norm_tpu(jnp.ones(x), jnp.ones((weight,)), eps=EPS, chip=chip(target))


def make_case(target, rows: int, D: int):
    array = jax.ShapeDtypeStruct
    run = lambda x, w: rms_norm_tpu(x, w, eps=EPS, chip=target)
    return run, (array((rows, D), jnp.bfloat16), array((D,), jnp.float32))


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    cases = [{"rows": rows, "D": D} for rows, D in [(1, 4096), (8, 1024), (64, 7168), (2048, 4096), (2048, 7168)]]
    for report in aot.run_cases([aot.Case(f"{__file__}:make_case", case) for case in cases], name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 1, report
