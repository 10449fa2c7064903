"""Number formats against the golden tables and, code point by code point, against ml_dtypes."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_cases import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.formats import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    fp4_scale,
    fp8_scale,
    hadamard,
    pack_fp4,
    round_e2m1,
    round_e4m3,
    unpack_fp4,
)
from pallas_kernels.kv_rows import Fp8Rows, dequantize_rows, empty_rows, quantize_rows

EVERY = np.arange(256, dtype=np.uint8)


def data(name: str):
    return np.load(GOLDEN / "ops" / f"{name}.npz")


def codes_of(x) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


def test_every_e4m3_code_survives_decoding_and_encoding():
    codes = EVERY.view(ml_dtypes.float8_e4m3fn)
    finite = ~np.isnan(codes.astype(np.float32))
    np.testing.assert_array_equal(codes_of(encode_e4m3(decode_e4m3(jnp.asarray(codes))))[finite], EVERY[finite])


def test_every_e2m1_code_survives_decoding_and_encoding():
    codes = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(encode_e2m1(decode_e2m1(codes)), codes)
    np.testing.assert_array_equal(unpack_fp4(pack_fp4(codes)), codes)
    assert int(pack_fp4(jnp.asarray([3, 9], jnp.uint8))[0]) == 0x93  # low nibble = even k


def test_every_e8m0_exponent_survives_decoding_and_encoding():
    np.testing.assert_array_equal(encode_e8m0(decode_e8m0(jnp.asarray(EVERY))), EVERY)
    assert np.isnan(decode_e8m0(jnp.uint8(255)))


def test_e8m0_rounds_up_and_never_past_a_power_of_two():
    exact = np.ldexp(1.0, np.arange(-120, 120)).astype(np.float32)
    just_above = np.nextafter(exact, np.float32(np.inf))
    just_below = np.nextafter(exact, np.float32(0))
    byte = np.arange(-120, 120) + 127
    np.testing.assert_array_equal(encode_e8m0(jnp.asarray(exact)), byte)
    np.testing.assert_array_equal(encode_e8m0(jnp.asarray(just_above)), byte + 1)
    np.testing.assert_array_equal(encode_e8m0(jnp.asarray(just_below)), byte)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-700, 700, width=32), min_size=1, max_size=64))
def test_rounding_equals_ml_dtypes_within_range_and_saturates_outside(values):
    x = np.asarray(values, np.float32)
    fp8 = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    fp4 = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(round_e4m3(jnp.asarray(x)), fp8)
    np.testing.assert_array_equal(encode_e4m3(jnp.asarray(x)).astype(jnp.float32), fp8)
    np.testing.assert_array_equal(round_e2m1(jnp.asarray(x)), fp4)
    np.testing.assert_array_equal(decode_e2m1(encode_e2m1(jnp.asarray(x))), fp4)


def test_ties_go_to_the_even_code_in_every_binade():
    """All midpoints of neighbouring e4m3 values, subnormals and zeros included."""
    values = np.unique(EVERY.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    values = values[np.isfinite(values)]
    middle = (values[1:] + values[:-1]) / 2
    np.testing.assert_array_equal(
        round_e4m3(jnp.asarray(middle)), middle.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )


def test_fp4_rounding_table():
    want = data("fp4")
    np.testing.assert_array_equal(encode_e2m1(jnp.asarray(want["round_in"])), want["round_code"])
    np.testing.assert_array_equal(round_e2m1(jnp.asarray(want["round_in"])), want["round_value"])


def test_scales_of_zeros_are_the_floor():
    assert int(fp8_scale(jnp.float32(0))) == 127 - 22  # 1e-4 / 448 rounds up to 2^-22
    assert int(fp4_scale(jnp.float32(0))) == 1


@pytest.mark.parametrize("n", [32, 64, 128])
def test_hadamard(n):
    want = data("hadamard")
    got = np.asarray(hadamard(jnp.asarray(want[f"x{n}"])), np.float64)
    assert np.abs(got - want[f"y{n}_f64"]).max() <= 2e-6 * np.abs(want[f"y{n}_f64"]).max()
    with pytest.raises(ValueError, match="96 channels; it must be a power of two"):
        hadamard(jnp.zeros((2, 96)))


def test_kv_rows_match_the_golden_bytes():
    want = data("kv_rounding")
    rows = quantize_rows(jnp.asarray(want["x"]), 64)
    np.testing.assert_array_equal(codes_of(rows.codes), want["fp8_bytes"])
    np.testing.assert_array_equal(rows.scales[:, :7], want["scale_e8m0_bytes"])
    assert not rows.scales[:, 7:].any()
    np.testing.assert_array_equal(dequantize_rows(rows, jnp.float32)[:, :448], want["rounded_f32"][:, :448])
    np.testing.assert_array_equal(
        dequantize_rows(rows, jnp.float32)[:, 448:], want["x"][:, 448:].astype(ml_dtypes.bfloat16).astype(np.float32)
    )


SIZES = [(512, 64, 584), (128, 64, 64 + 8 + 128), (96, 16, 80 + 8 + 32)]


@pytest.mark.parametrize(("dim", "rope_dim", "row_bytes"), SIZES)
def test_kv_rows_are_idempotent_and_of_the_stated_size(dim, rope_dim, row_bytes):
    wide = jnp.asarray(np.random.default_rng(dim).standard_normal((2, 5, dim)) * 30, jnp.bfloat16)
    rows = quantize_rows(wide, rope_dim)
    assert (
        rows.shape == wide.shape and sum(leaf.nbytes for leaf in (rows.codes, rows.scales, rows.rope)) == 10 * row_bytes
    )
    again = quantize_rows(dequantize_rows(rows, jnp.bfloat16), rope_dim)
    np.testing.assert_array_equal(dequantize_rows(again, jnp.float32), dequantize_rows(rows, jnp.float32))
    blank = empty_rows((3, dim), rope_dim)
    assert isinstance(blank, Fp8Rows) and blank.shape == (3, dim) and not dequantize_rows(blank, jnp.float32).any()
