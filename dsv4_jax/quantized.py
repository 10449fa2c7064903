"""QuantizedArray: packed codes and their block scales as one value, and its exact expansion (architecture 8)."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

FP4_BLOCK = (1, 32)  # a routed expert's fp4 weight has one scale per row and 32 columns


@functools.partial(jax.tree_util.register_dataclass, data_fields=("data", "scale"), meta_fields=("block", "packed"))
@dataclass(frozen=True)
class QuantizedArray:
    """A weight [..., N, K] as codes times one scale per block of `block` rows x columns (a last block may be partial).

    data: float8_e4m3fn [..., N, K], or, `packed`, uint8 [..., N, K // 2]: two e2m1 codes a byte, low nibble = even k.
    scale: uint8 e8m0 exponent bytes or float32, [..., ceil(N / block[0]), ceil(K / block[1])]; None where `data` holds
      the expanded values (see `expand`).
    """

    data: jax.Array
    scale: jax.Array | None
    block: tuple[int, int] = (128, 128)
    packed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, columns = self.data.shape
        return (*lead, columns * 2 if self.packed else columns)

    def __getitem__(self, index) -> QuantizedArray:
        """Index leading (stacking) axes only."""
        return dataclasses.replace(self, data=self.data[index], scale=None if self.scale is None else self.scale[index])


Weight = jax.Array | QuantizedArray


def decode_e8m0(scale: jax.Array) -> jax.Array:
    """uint8 exponent bytes b -> float32 2^(b - 127), by placing bits: 0 is the subnormal 2^-127, 255 is NaN."""
    bits = scale.astype(jnp.uint32)
    bits = jnp.where(bits == 0, jnp.uint32(0x00400000), bits << 23)
    return jnp.where(scale == 255, jnp.nan, jax.lax.bitcast_convert_type(bits, jnp.float32))


def decode_e4m3(codes: jax.Array) -> jax.Array:
    """float8_e4m3fn -> float32, exactly. CPUs have no such conversion, but have one from float16 (twice as fast)."""
    return jax.lax.platform_dependent(codes, cpu=_e4m3_by_f16, default=lambda c: c.astype(jnp.float32))


def decode_e2m1(codes: jax.Array) -> jax.Array:
    """uint8 codes 0..15 -> float32 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, by placing bits."""
    return jax.lax.platform_dependent(codes, cpu=_e2m1_by_f16, default=_e2m1_by_f32)


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


def unpack_fp4(data: jax.Array) -> jax.Array:
    """uint8 [..., K // 2] -> float32 [..., K]."""
    pairs = jnp.stack([data & 15, data >> 4], axis=-1)
    return decode_e2m1(pairs).reshape(*data.shape[:-1], data.shape[-1] * 2)


def dequantize(weight: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[..., N, K] in `dtype`; every product of a code and a power-of-two scale is exact in bfloat16 and wider.

    Arrays that are not quantised are cast.
    """
    if not isinstance(weight, QuantizedArray):
        return weight.astype(dtype)
    if weight.scale is None:
        return weight.data.astype(dtype)
    codes = unpack_fp4(weight.data) if weight.packed else decode_e4m3(weight.data)
    scale = decode_e8m0(weight.scale) if weight.scale.dtype == jnp.uint8 else weight.scale.astype(jnp.float32)
    return (codes * _expand(scale, weight.block, (codes.shape[-2], codes.shape[-1]))).astype(dtype)


def _expand(scale: jax.Array, block: tuple[int, int], shape: tuple[int, int]) -> jax.Array:
    """[..., n, k] block scales -> [..., N, K], cutting what the last blocks have too much."""
    rows, columns = shape
    scale = _repeat(scale, block[1], -1)[..., :columns]  # cut while it is one row per block
    return _repeat(scale, block[0], -2)[..., :rows, :]


def _repeat(x: jax.Array, times: int, axis: int) -> jax.Array:
    """`jnp.repeat` along a negative axis, as a broadcast that fuses."""
    split = x.ndim + axis + 1
    shape = x.shape
    x = jnp.broadcast_to(jnp.expand_dims(x, split), (*shape[:split], times, *shape[split:]))
    return x.reshape(*shape[: split - 1], shape[split - 1] * times, *shape[split:])


def _is_quantized(leaf) -> bool:
    return isinstance(leaf, QuantizedArray)


def expanded_bytes(tree, dtype: jax.typing.DTypeLike) -> int:
    """What the quantised weights of `tree` would take in `dtype`."""
    leaves = filter(_is_quantized, jax.tree.leaves(tree, is_leaf=_is_quantized))
    return sum(math.prod(leaf.shape) for leaf in leaves) * jnp.dtype(dtype).itemsize


def expand(tree, dtype: jax.typing.DTypeLike):
    """`tree` with the values of every QuantizedArray written out in `dtype`; they stay marked as quantised."""
    wide = lambda leaf: QuantizedArray(dequantize(leaf, dtype), None, leaf.block) if _is_quantized(leaf) else leaf
    return jax.tree.map(wide, tree, is_leaf=_is_quantized)
