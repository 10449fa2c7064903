"""KV rows in 8 bits, channel by channel against the definition in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_cases import slow

from pallas_kernels.kv_rows import Fp8Rows, dequantize_rows, empty_rows, quantize_rows, scale_bytes

R = 64


def by_definition(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows fp32 [S, D] -> codes, exponent bytes, the values they stand for; float64, so every step is exact."""
    coded = x[:, :-R].astype(np.float64)
    groups = coded.reshape(len(x), -1, 64)
    amax = np.maximum(np.abs(groups).max(-1), np.float32(1e-4))
    exponent = np.ceil(np.log2(amax * np.float64(np.float32(1 / 448))))
    # log2 may land a hair beside a whole number: move to the smallest power that is not below.
    exact = (amax.astype(np.float32) * np.float32(1 / 448)).astype(np.float64)
    exponent = np.where(2.0**exponent < exact, exponent + 1, exponent)
    exponent = np.where(2.0 ** (exponent - 1) >= exact, exponent - 1, exponent)
    scale = 2.0**exponent
    codes = np.clip(groups / scale[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.reshape(coded.shape), (exponent + 127).astype(np.uint8), codes.astype(np.float64) * scale[..., None]


CASES = {
    "normal": lambda rng: rng.standard_normal((16, 512)),
    "wide range": lambda rng: rng.standard_normal((16, 512)) * 2.0 ** rng.integers(-30, 30, (16, 512)),
    "zeros": lambda rng: np.zeros((2, 512)),
    "below the floor": lambda rng: rng.standard_normal((4, 512)) * 1e-7,
    "powers of two": lambda rng: 2.0 ** rng.integers(-8, 8, (8, 512)),
    "saturating": lambda rng: np.where(rng.random((8, 512)) < 0.1, 448.0, 447.9),
    "one group": lambda rng: rng.standard_normal((8, 128)),
}


QUICK = ("normal", "saturating")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CASES])
def test_codes_scales_and_values_are_exact(name):
    x = CASES[name](np.random.default_rng(len(name))).astype(np.float32)
    rows = quantize_rows(jnp.asarray(x), R)
    codes, byte, values = by_definition(x)
    np.testing.assert_array_equal(np.asarray(rows.codes).view(np.uint8) & 0x7F, codes.view(np.uint8) & 0x7F)
    np.testing.assert_array_equal(rows.codes.astype(jnp.float32), codes.astype(np.float32))
    np.testing.assert_array_equal(rows.scales[:, : byte.shape[1]], byte)
    assert rows.scales.shape[1] == scale_bytes(x.shape[1] - R) and not rows.scales[:, byte.shape[1] :].any()
    np.testing.assert_array_equal(rows.rope, x[:, -R:].astype(ml_dtypes.bfloat16))
    for dtype in (jnp.float32, jnp.bfloat16):
        wide = dequantize_rows(rows, dtype)
        assert wide.dtype == dtype and wide.shape == x.shape == rows.shape
        np.testing.assert_array_equal(np.asarray(wide[:, :-R], np.float64), values.reshape(len(x), -1))


def test_leading_axes_and_empty_rows():
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 512)).astype(np.float32)
    rows = quantize_rows(jnp.asarray(x), R)
    one = quantize_rows(jnp.asarray(x[1, 2]), R)
    np.testing.assert_array_equal(dequantize_rows(rows, jnp.float32)[1, 2], dequantize_rows(one, jnp.float32))
    blank = empty_rows(x.shape, R)
    assert isinstance(blank, Fp8Rows) and blank.shape == rows.shape and blank.ndim == 4
    assert not np.asarray(dequantize_rows(blank, jnp.float32)).any()
