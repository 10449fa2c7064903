"""QuantizedArray beyond the golden weights: stacked experts, other blocks, scales that are no powers of two."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.linear import linear, weight
from dsv4_jax.quantized import (
    QuantizedArray,
    dequantize,
    dequantize_halves,
)
from pallas_kernels.formats import _e2m1_by_f16, _e2m1_by_f32, _e4m3_by_f16


def draw(shape: tuple[int, ...], block: tuple[int, int], seed: int = 0) -> QuantizedArray:
    """Every finite e4m3 code, float32 scales."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 127, shape) | rng.integers(0, 2, shape) << 7
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    data = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    return QuantizedArray(jnp.asarray(data), jnp.asarray(rng.uniform(0.1, 3, grid), jnp.float32), block)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (8, 12), (9, 13), (3, 4, 12), (2, 3, 9, 5)])
@pytest.mark.parametrize("block", [(4, 4), (2, 3), (1, 32)])
def test_each_element_has_the_scale_of_its_own_block(shape, block):
    w = draw(shape, block)
    rows, columns = np.arange(shape[-2]) // block[0], np.arange(shape[-1]) // block[1]
    want = np.asarray(w.data).astype(np.float32) * np.asarray(w.scale)[..., rows[:, None], columns]
    np.testing.assert_array_equal(dequantize(w, jnp.float32), want)
    assert w.shape == shape


def test_indexing_picks_one_of_a_stack():
    w = draw((3, 2, 8, 12), (4, 4))
    one = w[1, 0]
    assert one.shape == (8, 12) and one.block == w.block
    np.testing.assert_array_equal(dequantize(one, jnp.float32), dequantize(w, jnp.float32)[1, 0])


def test_the_fast_decoders_of_cpu_equal_the_plain_ones():
    every = np.arange(256, dtype=np.uint8)
    codes = jnp.asarray(every.view(ml_dtypes.float8_e4m3fn))
    np.testing.assert_array_equal(_e4m3_by_f16(codes), every.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    nibbles = jnp.arange(16, dtype=jnp.uint8)
    magnitudes = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    for decode in (_e2m1_by_f16, _e2m1_by_f32):
        got = np.asarray(decode(nibbles))
        np.testing.assert_array_equal(got, np.concatenate([magnitudes, -magnitudes]))
        assert np.signbit(got[8])  # code 8 is minus zero


def test_a_quantised_weight_is_one_parameter_that_jit_takes():
    w = draw((8, 12), (4, 4))
    assert len(jax.tree.leaves(w)) == 2
    np.testing.assert_array_equal(jax.jit(lambda w: dequantize(w, jnp.float32))(w), dequantize(w, jnp.float32))


@pytest.mark.parametrize("K", [64, 80, 96])
def test_a_packed_weight_is_multiplied_by_its_values(K):
    rng = np.random.default_rng(K)
    data = jnp.asarray(rng.integers(0, 256, (24, K // 2)), jnp.uint8)
    scale = jnp.asarray(rng.integers(120, 130, (24, -(-K // 32))), jnp.uint8)
    w, x = QuantizedArray(data, scale, (1, 32), True), jnp.asarray(rng.standard_normal((3, K)), jnp.float32)
    wide = np.asarray(dequantize(w, jnp.float32))
    np.testing.assert_array_equal(np.stack(dequantize_halves(w, jnp.float32), -1).reshape(wide.shape), wide)
    want = np.asarray(x, np.float64) @ wide.T
    np.testing.assert_allclose(linear(x, w), want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_an_array_is_cast():
    out = dequantize(jnp.ones((2, 3), jnp.bfloat16), jnp.float32)
    assert out.dtype == jnp.float32 and out.shape == (2, 3)


def test_an_unquantised_weight_keeps_its_dtype():
    assert weight((2, 3), jnp.bfloat16, None, "fp8")[...].dtype == jnp.bfloat16
