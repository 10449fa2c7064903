"""QuantizedArray: packed codes and their block scales as one value, and its exact expansion (architecture 8)."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    encode_e4m3,
    fp8_scale,
    unpack_fp4,
)
from pallas_kernels.index_rows import quantize_index_rows

FP4_BLOCK = (1, 32)  # a routed expert's fp4 weight has one scale per row and 32 columns


@functools.partial(jax.tree_util.register_dataclass, data_fields=("data", "scale"), meta_fields=("block", "packed"))
@dataclass(frozen=True)
class QuantizedArray:
    """A weight [..., N, K] as codes times one scale per block of `block` rows x columns (a last block may be partial).

    data: float8_e4m3fn [..., N, K], or, `packed`, uint8 [..., N, K // 2]: two e2m1 codes a byte, low nibble = even k.
    scale: uint8 e8m0 exponent bytes or float32, [..., ceil(N / block[0]), ceil(K / block[1])]; None where `data` holds
      the expanded values (see `generate/prepare.py`).
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


@functools.partial(jax.tree_util.register_dataclass, data_fields=("data",), meta_fields=())
@dataclass(frozen=True)
class Turned:
    """A weight [..., N, K] held as data [K, ..., N]: in this order a CPU multiplies a few rows with it fastest."""

    data: jax.Array

    @classmethod
    def of(cls, weight: jax.Array) -> Turned:
        return cls(jnp.moveaxis(weight, -1, 0))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[1:], self.data.shape[0])

    @property
    def dtype(self) -> jnp.dtype:
        return self.data.dtype

    def astype(self, dtype: jax.typing.DTypeLike) -> Turned:
        return Turned(self.data.astype(dtype))

    def __getitem__(self, index) -> Turned:
        """The whole of it, as `parameter[...]` asks."""
        if index is not Ellipsis:
            raise TypeError(f"a turned weight {self.shape} cannot be indexed by {index}; only [...] is known")
        return self

    def as_matrix(self) -> Turned:
        """[..., N, K] as one matrix [all rows, K]."""
        return Turned(self.data.reshape(self.data.shape[0], -1))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("data",), meta_fields=())
@dataclass(frozen=True)
class TurnedGroups:
    """As `Turned`, for a block-diagonal weight [G * N, K]: data [G, K, N], one block a group."""

    data: jax.Array

    @classmethod
    def of(cls, weight: jax.Array, groups: int) -> TurnedGroups:
        return cls(jnp.swapaxes(weight.reshape(groups, -1, weight.shape[-1]), 1, 2))

    @property
    def shape(self) -> tuple[int, ...]:
        G, K, N = self.data.shape
        return G * N, K

    def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The weight as it was; a product that takes its groups apart again reads `data` where it lies."""
        return jnp.swapaxes(self.data, 1, 2).reshape(self.shape).astype(dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("whole", "each"), meta_fields=())
@dataclass(frozen=True)
class Stack:
    """A weight and its parts, each an array of its own: what is cut out of an array inside a program is copied.

    whole: experts' weights [E, ..., K], or a block-diagonal one [G * N, K]; each: E of [..., K], or G of [N, K].
    On a CPU both are the same memory.
    """

    whole: jax.Array
    each: tuple[jax.Array, ...]

    @classmethod
    def of(cls, whole: jax.Array, parts: np.ndarray) -> Stack:
        """parts: a view of `whole` on the host whose first axis counts the parts."""
        device = next(iter(whole.devices()))
        return cls(whole, tuple(jax.device_put(part, device, may_alias=True) for part in parts))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    def __getitem__(self, index) -> jax.Array:
        return self.whole[index]

    def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        return self.whole.astype(dtype)


Weight = jax.Array | QuantizedArray  # or, in a prepared model, what is turned


def dequantize(weight: Weight, dtype: jax.typing.DTypeLike) -> Any:
    """[..., N, K] in `dtype`; every product of a code and a power-of-two scale is exact in bfloat16 and wider.

    Arrays that are not quantised are cast; a turned weight stays turned.
    """
    if not isinstance(weight, QuantizedArray):
        return weight.astype(dtype)
    if weight.scale is None:
        return weight.data.astype(dtype)
    codes = decode_e2m1(unpack_fp4(weight.data)) if weight.packed else decode_e4m3(weight.data)
    scale = decode_e8m0(weight.scale) if weight.scale.dtype == jnp.uint8 else weight.scale.astype(jnp.float32)
    return (codes * _expand(scale, weight.block, (codes.shape[-2], codes.shape[-1]))).astype(dtype)


def dequantize_halves(weight: QuantizedArray, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """A packed weight [..., N, K] as its even and its odd columns, each [..., N, K // 2] in `dtype`.

    The two codes of a byte need not be interleaved, which costs a CPU more than all the rest of the expansion.
    """
    assert weight.packed and weight.scale is not None
    scale = decode_e8m0(weight.scale) if weight.scale.dtype == jnp.uint8 else weight.scale.astype(jnp.float32)
    rows, columns = weight.block
    scale = _expand(scale, (rows, columns // 2), (weight.data.shape[-2], weight.data.shape[-1]))
    half = lambda codes: (decode_e2m1(codes) * scale).astype(dtype)
    return half(weight.data & 15), half(weight.data >> 4)


def quantize_fp8(x: jax.Array, block: tuple[int, int] = (1, 128)) -> QuantizedArray:
    """x [..., N, K] -> e4m3 codes and one e8m0 scale per block: (1, 128) for activations, (128, 128) for weights.

    The scale is the smallest power of two that brings a block's largest magnitude (at least 1e-4) to 448 or below;
    codes are rounded to nearest, ties to even. Source: architecture 8.1, 8.2.
    """
    scale = fp8_scale(_block_amax(x, block))
    return QuantizedArray(encode_e4m3(_over(x, scale, block)), scale, block)


def quantize_fp4(x: jax.Array) -> QuantizedArray:
    """x [..., N, K] -> packed e2m1 codes and one e8m0 scale per row and 32 columns. Source: architecture 8.3."""
    rows, half = quantize_index_rows(x).data, x.shape[-1] // 2
    return QuantizedArray(rows[..., :half], rows[..., half:], FP4_BLOCK, packed=True)


def _block_amax(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Largest magnitude of each block: [..., N, K] -> fp32 [..., ceil(N / block[0]), ceil(K / block[1])]."""
    *lead, rows, columns = x.shape
    pad = [(0, 0)] * len(lead) + [(0, -rows % block[0]), (0, -columns % block[1])]
    tiles = jnp.pad(jnp.abs(x.astype(jnp.float32)), pad)
    tiles = tiles.reshape(*lead, tiles.shape[-2] // block[0], block[0], tiles.shape[-1] // block[1], block[1])
    return tiles.max(axis=(-3, -1))


def _over(x: jax.Array, scale: jax.Array, block: tuple[int, int]) -> jax.Array:
    """x divided by its blocks' scales, exactly."""
    return x.astype(jnp.float32) * _expand(decode_e8m0(254 - scale), block, (x.shape[-2], x.shape[-1]))


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
