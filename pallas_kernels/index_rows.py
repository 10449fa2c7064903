"""Index keys in 4 bits: e2m1 codes, two a byte, then their e8m0 scales; 68 bytes in one row for D = 128."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.formats import decode_e2m1, decode_e8m0, encode_e2m1, fp4_scale, in_groups, pack_fp4, unpack_fp4

GROUP = 32  # channels that share a scale


@functools.partial(jax.tree_util.register_dataclass, data_fields=("data",), meta_fields=("dim",))
@dataclass(frozen=True)
class Fp4Rows:
    """Rows [..., N, dim] as uint8 [..., N, dim / 2 + one per 32 channels].

    Codes and scales share a row, since a TPU fills the last axis of an array of 4 bytes a row up to 128.
    The low nibble of a byte is the even channel. Source: architecture 8.3.
    """

    data: jax.Array
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-1], self.dim)


def empty_index_rows(shape: tuple[int, ...]) -> Fp4Rows:
    """Zero rows of `shape` [..., N, D]."""
    *lead, dim = shape
    _check(dim)
    return Fp4Rows(jnp.zeros((*lead, dim // 2 + math.ceil(dim / GROUP)), jnp.uint8), dim)


def quantize_index_rows(rows: jax.Array) -> Fp4Rows:
    """[..., N, D] -> Fp4Rows. Lossless for rows that were already rounded so."""
    dim = rows.shape[-1]
    _check(dim)
    groups = in_groups(rows.astype(jnp.float32), GROUP)
    byte = fp4_scale(jnp.max(jnp.abs(groups), axis=-1))
    codes = encode_e2m1(groups * decode_e8m0(254 - byte)[..., None]).reshape(*rows.shape[:-1], -1)[..., :dim]
    return Fp4Rows(jnp.concatenate([pack_fp4(codes), byte], axis=-1), dim)


def dequantize_index_rows(rows: jax.Array | Fp4Rows, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[..., N, D] in `dtype`, exact in bfloat16 and wider; arrays are cast."""
    if not isinstance(rows, Fp4Rows):
        return rows.astype(dtype)
    half = rows.dim // 2
    groups = in_groups(decode_e2m1(unpack_fp4(rows.data[..., :half])), GROUP)
    wide = groups * decode_e8m0(rows.data[..., half:])[..., None]
    return wide.reshape(*rows.data.shape[:-1], -1)[..., : rows.dim].astype(dtype)


def _check(dim: int) -> None:
    if dim % 2:
        raise ValueError(f"rows of {dim} channels cannot be held in 4 bits: two codes share a byte")
