"""Rounded activations for TPU, in the strict interpreter: bit for bit what the reference gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.round_rows import round_rows, round_rows_tpu

V6E = chip("v6e")
STRICT = pltpu.InterpretParams()


def draw(shape, dtype, seed=0):
    """Magnitudes over many octaves, zeros, exact ties, a group of zeros and one below the least scale."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)
    x[rng.random(shape) < 0.1] = 0
    ties = rng.random(shape) < 0.2
    x[ties] = rng.integers(-40, 40, shape)[ties] * 2.0 ** rng.integers(-8, 8, shape)[ties]
    x[0, :128], x[-1, -128:] = 0, x[-1, -128:] * 1e-9
    return jnp.asarray(x, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 256), (8, 4096), (3, 128), (50, 384), (300, 1280)])
def test_equals_the_reference_bit_for_bit(shape, dtype):
    x = draw(shape, dtype)
    got = round_rows_tpu(x, chip=V6E, interpret=STRICT)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(round_rows(x), np.float32))


@pytest.mark.interpreter
def test_every_e4m3_value_under_every_usual_scale_stays():
    codes = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    codes = np.where(np.isnan(codes), 448, codes)  # each half has a code of the largest magnitude
    x = jnp.asarray(np.concatenate([codes * 2.0**k for k in range(-15, 16)])[None], jnp.float32)
    np.testing.assert_array_equal(round_rows_tpu(x, chip=V6E, interpret=STRICT), x)


@pytest.mark.interpreter
def test_what_is_not_finite_stays_in_its_group():
    x = jnp.ones((2, 384), jnp.bfloat16).at[0, 130].set(jnp.nan).at[1, 5].set(jnp.inf)
    for got in (round_rows(x), round_rows_tpu(x, chip=V6E, interpret=STRICT)):
        assert not jnp.isfinite(got[0, 130]) and not jnp.isfinite(got[1, 5])
        assert (got[0, :128] == 1).all() and (got[1, 128:] == 1).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="use the jnp op"):
        round_rows_tpu(jnp.ones((2, 100)), chip=V6E)
    with pytest.raises(ValueError, match="v5e, v5p, v6e, v7x"):
        round_rows_tpu(jnp.ones((2, 128)), chip=chip("H100"))


def make_case(target, rows: int, K: int):
    run = lambda x: round_rows_tpu(x, chip=target)
    return run, (jax.ShapeDtypeStruct((rows, K), jnp.bfloat16),)


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    cases = [{"rows": rows, "K": K} for rows, K in [(1, 1024), (8, 8192), (96, 2048), (2048, 4096), (2048, 7168)]]
    for report in aot.run_cases([aot.Case(f"{__file__}:make_case", case) for case in cases], name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 1, report
