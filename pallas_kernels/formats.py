"""Number formats of the checkpoint and the caches: e4m3, e2m1 and e8m0 to float32 and back, bit for bit.

Everything goes by bits or by exact float32 arithmetic: XLA's `exp2` and `log2` miss exact powers of two, and its cast
to e4m3 overflows to NaN and may round twice. Source: architecture 8; OCP Microscaling Formats 1.0 for the code points.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

E4M3_MAX, E2M1_MAX = 448.0, 6.0
FP8_SMALLEST = 1e-4  # floor on a group's largest magnitude, as in the reference
FP4_SMALLEST = 6 * 2.0**-126


def decode_e8m0(scale: jax.Array) -> jax.Array:
    """uint8 exponent bytes b -> float32 2^(b - 127), by placing bits: 0 is the subnormal 2^-127, 255 is NaN."""
    bits = scale.astype(jnp.uint32)
    bits = jnp.where(bits == 0, jnp.uint32(0x00400000), bits << 23)
    return jnp.where(scale == 255, jnp.nan, jax.lax.bitcast_convert_type(bits, jnp.float32))


def encode_e8m0(x: jax.Array) -> jax.Array:
    """The exponent byte of the smallest power of two that is not below x: float32 x > 0 -> uint8; NaN gives 255."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    exponent, rest = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    subnormal = jnp.where(rest > 0x400000, 1, 0)  # byte 0 is 2^-127, itself a subnormal
    byte = jnp.where(exponent == 0, subnormal, exponent + (rest != 0))
    return jnp.minimum(byte, 255).astype(jnp.uint8)


def decode_e4m3(codes: jax.Array) -> jax.Array:
    """float8_e4m3fn -> float32, exactly. CPUs have no such conversion, but have one from float16 (twice as fast)."""
    return jax.lax.platform_dependent(codes, cpu=_e4m3_by_f16, default=lambda c: c.astype(jnp.float32))


def round_e4m3(x: jax.Array) -> jax.Array:
    """float32 -> the nearest e4m3 value, still float32: ties to even, saturating at 448."""
    return _round_to_grid(x, mantissa=3, lowest=-6, largest=E4M3_MAX)


def encode_e4m3(x: jax.Array) -> jax.Array:
    """float32 -> float8_e4m3fn, rounded as by `round_e4m3`."""
    return round_e4m3(x).astype(jnp.float8_e4m3fn)


def decode_e2m1(codes: jax.Array) -> jax.Array:
    """uint8 codes 0..15 -> float32 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, by placing bits."""
    return jax.lax.platform_dependent(codes, cpu=_e2m1_by_f16, default=_e2m1_by_f32)


def round_e2m1(x: jax.Array) -> jax.Array:
    """float32 -> the nearest e2m1 value, still float32: ties to the even code, saturating at 6."""
    return _round_to_grid(x, mantissa=1, lowest=0, largest=E2M1_MAX)


def encode_e2m1(x: jax.Array) -> jax.Array:
    """float32 -> uint8 codes 0..15, rounded as by `round_e2m1`."""
    bits = jax.lax.bitcast_convert_type(round_e2m1(x), jnp.uint32)
    exponent = ((bits >> 23) & 0xFF).astype(jnp.int32)
    normal = ((exponent - 126) << 1) | ((bits >> 22) & 1).astype(jnp.int32)  # 1.0 has exponent byte 127 and code 2
    code = jnp.where(exponent >= 127, normal, (exponent == 126).astype(jnp.int32))
    return (code | (bits >> 28 & 8).astype(jnp.int32)).astype(jnp.uint8)


def pack_fp4(codes: jax.Array) -> jax.Array:
    """uint8 codes [..., K] -> bytes [..., K // 2], the low nibble being the even k."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_fp4(data: jax.Array) -> jax.Array:
    """Bytes [..., K // 2] -> codes uint8 [..., K]."""
    return jnp.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], data.shape[-1] * 2)


def fp8_scale(amax: jax.Array) -> jax.Array:
    """Largest magnitude of a group -> the byte of its power-of-two scale, 2^ceil(log2(max(amax, 1e-4) / 448))."""
    return encode_e8m0(jnp.maximum(amax.astype(jnp.float32), FP8_SMALLEST) * jnp.float32(1 / E4M3_MAX))


def fp4_scale(amax: jax.Array) -> jax.Array:
    """As `fp8_scale`, for e2m1: 2^ceil(log2(max(amax, 6 * 2^-126) / 6))."""
    return encode_e8m0(jnp.maximum(amax.astype(jnp.float32), FP4_SMALLEST) * jnp.float32(1 / E2M1_MAX))


def in_groups(x: jax.Array, group: int) -> jax.Array:
    """x [..., channels] -> [..., groups, group], the last group padded with zeros."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % group)])
    return x.reshape(*x.shape[:-1], -1, group)


def hadamard(x: jax.Array) -> jax.Array:
    """x [..., n] times the Sylvester-ordered Hadamard matrix over sqrt(n), n a power of two; fp32 inside."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"hadamard: the last axis has {n} channels; it must be a power of two")
    wide = x.astype(jnp.float32)
    for width in (1 << i for i in range(n.bit_length() - 1)):
        pairs = wide.reshape(*x.shape[:-1], n // (2 * width), 2, width)
        wide = jnp.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        wide = wide.reshape(x.shape)
    return (wide * jnp.float32(n**-0.5)).astype(x.dtype)


def _round_to_grid(x: jax.Array, *, mantissa: int, lowest: int, largest: float) -> jax.Array:
    """Round to multiples of the spacing at each magnitude; every step but the rounding itself is exact."""
    x = jnp.clip(x.astype(jnp.float32), -largest, largest)
    exponent = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
    spacing = jnp.maximum(exponent, lowest + 127) - mantissa
    as_float = lambda e: jax.lax.bitcast_convert_type(e << 23, jnp.float32)
    steps = jax.lax.round(x * as_float(254 - spacing), jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return steps * as_float(spacing)


def _e4m3_by_f16(codes: jax.Array) -> jax.Array:
    """Sign, exponent and mantissa in float16's fields are the value times 2^-8, subnormals included."""
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), jnp.float16)
    return jnp.where((bits & 0x7F) == 0x7F, jnp.nan, half.astype(jnp.float32) * 2**8)


def _e2m1_by_f16(codes: jax.Array) -> jax.Array:
    """As above; the value times 2^-14."""
    bits = codes.astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type(((bits & 8) << 12) | ((bits & 7) << 9), jnp.float16)
    return half.astype(jnp.float32) * 2**14


def _e2m1_by_f32(codes: jax.Array) -> jax.Array:
    codes = codes.astype(jnp.uint32)
    sign, exponent, mantissa = (codes & 8) << 28, (codes >> 1) & 3, codes & 1
    normal = ((exponent + 126) << 23) | (mantissa << 22)
    subnormal = mantissa * jnp.uint32(0x3F000000)  # 0 or 0.5
    return jax.lax.bitcast_convert_type(sign | jnp.where(exponent == 0, subnormal, normal), jnp.float32)
