"""KV rows in 8-bit storage: 448 e4m3 codes, 64 bfloat16 rotary channels and 7 scales, 584 bytes in all for D = 512."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.formats import decode_e4m3, decode_e8m0, encode_e4m3, fp8_scale, in_groups

GROUP = 64  # channels that share a scale
SCALE_ALIGN = 8  # scales are padded with zero bytes to a multiple of this


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales", "rope"), meta_fields=())
@dataclass(frozen=True)
class Fp8Rows:
    """KV rows [..., S, D] whose trailing R channels, the rotary ones, stay bfloat16.

    codes: float8_e4m3fn [..., S, D - R]; scales: uint8 e8m0 [..., S, one per 64 channels, padded with 0 to a multiple
    of 8]; rope: bfloat16 [..., S, R]. Source: architecture 8.2, 8.6.
    """

    codes: jax.Array
    scales: jax.Array
    rope: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.codes.shape[-1] + self.rope.shape[-1])

    @property
    def ndim(self) -> int:
        return self.codes.ndim


Rows = jax.Array | Fp8Rows


def scale_bytes(channels: int) -> int:
    """Bytes of scales that a row with so many coded channels has, padding included."""
    return math.ceil(math.ceil(channels / GROUP) / SCALE_ALIGN) * SCALE_ALIGN


def empty_rows(shape: tuple[int, ...], rope_dim: int) -> Fp8Rows:
    """Zero rows of `shape` [..., S, D]."""
    *lead, dim = shape
    coded = dim - rope_dim
    zeros = lambda width, dtype: jnp.zeros((*lead, width), dtype)
    return Fp8Rows(zeros(coded, jnp.float8_e4m3fn), zeros(scale_bytes(coded), jnp.uint8), zeros(rope_dim, jnp.bfloat16))


def quantize_rows(rows: jax.Array, rope_dim: int) -> Fp8Rows:
    """[..., S, D] -> Fp8Rows. Lossless for rows that were already rounded so and whose rotary channels are bfloat16."""
    coded = rows.shape[-1] - rope_dim
    groups = in_groups(rows[..., :coded].astype(jnp.float32), GROUP)
    byte = fp8_scale(jnp.max(jnp.abs(groups), axis=-1))
    codes = encode_e4m3(groups * decode_e8m0(254 - byte)[..., None])
    codes = codes.reshape(*rows.shape[:-1], -1)[..., :coded]
    pad = [(0, 0)] * (byte.ndim - 1) + [(0, scale_bytes(coded) - byte.shape[-1])]
    return Fp8Rows(codes, jnp.pad(byte, pad), rows[..., coded:].astype(jnp.bfloat16))


def dequantize_rows(rows: Rows, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[..., S, D] in `dtype`, exact in bfloat16 and wider; arrays are cast."""
    if not isinstance(rows, Fp8Rows):
        return rows.astype(dtype)
    coded = rows.codes.shape[-1]
    groups = in_groups(decode_e4m3(rows.codes), GROUP)
    scale = decode_e8m0(rows.scales[..., : groups.shape[-2]])
    wide = (groups * scale[..., None]).reshape(*rows.codes.shape[:-1], -1)[..., :coded]
    return jnp.concatenate([wide.astype(dtype), rows.rope.astype(dtype)], axis=-1)
