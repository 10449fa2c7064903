"""KV rows for the cache on TPU: norm, rotation and rounding in one program, where XLA makes some twenty."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.formats import E4M3_MAX, FP8_SMALLEST
from pallas_kernels.fp8_matmul.tpu import rotate_back, rotation_tables
from pallas_kernels.kv_rows import GROUP, Fp8Rows, scale_bytes
from pallas_kernels.rms_norm.tpu import LANES, rms_factor, row_tile
from pallas_kernels.round_rows.tpu import power, round_to_grid, scale_exponent
from pallas_kernels.store_rows.reference import check_shapes


def _encode(chunk: jax.Array, is_low: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """128 channels, two groups, fp32 -> values of their codes; their scale bytes; and each group's, int32 [rows, 1]."""
    magnitude = jnp.abs(chunk)
    found = []
    for part in (jnp.where(is_low, magnitude, 0), jnp.where(is_low, 0, magnitude)):
        amax = jnp.maximum(jnp.max(part, axis=1, keepdims=True), FP8_SMALLEST) * jnp.float32(1 / E4M3_MAX)
        found.append(scale_exponent(amax))
    scale = jnp.where(is_low, found[0], found[1])
    return round_to_grid(chunk * power(254 - scale), mantissa=3, lowest=-6, largest=E4M3_MAX), scale, found


def _chunks(x_ref, weight_ref, own_ref, partner_ref, eps: float):
    """128 channels after the other, normed, the last ones turned: where they start, and [rows, 128] in x's dtype."""
    factor = rms_factor(x_ref, eps)
    for start in range(0, x_ref.shape[1], LANES):
        cut = slice(start, start + LANES)
        chunk = (x_ref[:, cut].astype(jnp.float32) * factor * weight_ref[:, cut]).astype(x_ref.dtype)
        yield start, rotate_back(chunk, own_ref[...], partner_ref[...]) if cut.stop == x_ref.shape[1] else chunk


def _wide_kernel(x_ref, weight_ref, own_ref, partner_ref, out_ref, *, eps: float, coded: int):
    lane = jax.lax.broadcasted_iota(jnp.int32, (x_ref.shape[0], LANES), 1)
    for start, chunk in _chunks(x_ref, weight_ref, own_ref, partner_ref, eps):
        if start < coded:
            codes, scale, _ = _encode(chunk.astype(jnp.float32), lane < GROUP)
            chunk = jnp.where(lane < coded - start, (codes * power(scale)).astype(chunk.dtype), chunk)
        out_ref[:, start : start + LANES] = chunk


def _kernel(x_ref, weight_ref, own_ref, partner_ref, codes_ref, scales_ref, rope_ref, *, eps: float):
    rows, *alone, coded = codes_ref.shape
    at = (slice(None), *(0 for _ in alone))
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    scales = jnp.zeros((rows, LANES), jnp.int32)
    for start, chunk in _chunks(x_ref, weight_ref, own_ref, partner_ref, eps):
        if start + LANES == x_ref.shape[1]:
            rope_ref[at] = chunk[:, coded - start :].astype(rope_ref.dtype)
        if coded <= start:
            continue
        codes, _, found = _encode(chunk.astype(jnp.float32), lane < GROUP)
        kept = min(coded - start, LANES)
        codes_ref[*at, start : start + kept] = codes[:, :kept].astype(codes_ref.dtype)
        for i, byte in enumerate(found[: kept // GROUP]):
            scales = jnp.where(lane == start // GROUP + i, byte, scales)
    scales_ref[at] = scales[:, : scales_ref.shape[-1]].astype(jnp.float32).astype(scales_ref.dtype)


def store_rows_tpu(
    rows: jax.Array,
    weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    chip: Chip,
    wide: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
) -> Fp8Rows | jax.Array:
    """`reference.store_rows` on the TPU `chip`.

    Raises:
      ValueError: the shapes disagree, D is no multiple of 128, not whole groups of 64 channels stay or more than 128
        turn, or `chip` is not a TPU.
    """
    check_shapes(rows, weight, cos, sin)
    require(chip, "store_rows_tpu", platform="tpu")
    (B, T, D), R = rows.shape, 2 * cos.shape[-1]
    if not is_whole(D, R):
        raise ValueError(f"store_rows_tpu: {D} channels of which {R} turn are not whole groups; use the jnp op")
    held = rows.reshape(B * T, D)
    tables = rotation_tables(*(t.astype(jnp.float32).reshape(B * T, -1) for t in (cos, -sin)))
    tile = row_tile(B * T, D)
    block = lambda width: pl.BlockSpec((tile, width), lambda i: (i, 0))
    # One row a sequence is laid out as whoever puts it in its place wants it; XLA would copy it.
    alone = (1,) if T == 1 and not wide else ()
    out_block = lambda width: pl.BlockSpec((tile, *alone, width), lambda i: (i, *(0 for _ in alone), 0))
    kept: list[Any] = [(D - R, jnp.float8_e4m3fn), (scale_bytes(D - R), jnp.uint8), (R, jnp.bfloat16)]
    kernel = functools.partial(_kernel, eps=eps)
    if wide:
        kept, kernel = [(D, rows.dtype)], functools.partial(_wide_kernel, eps=eps, coded=D - R)
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(B * T, tile),),
        in_specs=[block(D), pl.BlockSpec((1, D), lambda i: (0, 0)), block(LANES), block(LANES)],
        out_specs=[out_block(width) for width, _ in kept],
        out_shape=[jax.ShapeDtypeStruct((B * T, *alone, width), dtype) for width, dtype in kept],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="store_rows",
    )(held, weight.astype(jnp.float32)[None], *tables)
    found = [x.reshape(B, T, -1) for x in out]
    return found[0] if wide else Fp8Rows(*found)


def is_whole(channels: int, turning: int) -> bool:
    """Whether rows of so many channels are whole registers, with whole groups of 64 beside those that turn."""
    return channels % LANES == 0 and turning <= LANES and (channels - turning) % GROUP == 0
