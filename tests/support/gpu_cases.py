"""Programs for `pallas_kernels.aot` to compile: the GPU kernels at given shapes, as make(chip, **sizes)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Chip
from pallas_kernels.expert_matmul.gpu import expert_matmul_gpu
from pallas_kernels.fp8_matmul.gpu import fp8_matmul_gpu, grouped_output_projection_gpu

CODES = jnp.float8_e4m3fn


def array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def fp8_matmul(chip: Chip, rows: int, N: int, K: int, codes: bool = False):
    """x [rows, K], bfloat16 or codes, times w [N, K]."""
    args = [array(CODES if codes else jnp.bfloat16, rows, K), array(CODES, N, K), array(jnp.uint8, N // 128, K // 128)]
    args += [array(jnp.uint8, rows, K // 128)] * codes
    return lambda x, w, scale, x_scale=None: fp8_matmul_gpu(x, w, scale, x_scale=x_scale, chip=chip), args


def output_projection(chip: Chip, rows: int, H: int, groups: int, D: int = 512, rank: int = 1024):
    """o [1, rows, H, D] with 64 rotary channels."""
    N, K = groups * rank, H // groups * D
    tables = [array(jnp.float32, 1, rows, 32)] * 2
    args = [array(jnp.bfloat16, 1, rows, H, D), *tables, array(CODES, N, K), array(jnp.uint8, N // 128, K // 128)]
    return functools.partial(grouped_output_projection_gpu, groups=groups, chip=chip), args


def expert_matmul(chip: Chip, rows: int, blocks: int, E: int, N: int, K: int, packed: bool = True):
    """`blocks` blocks of `rows` rows, with FP4 or FP8 weights."""
    w, scale = array(CODES, E, N, K), array(jnp.uint8, E, N // 128, K // 128)
    if packed:
        w, scale = array(jnp.uint8, E, N, K // 2), array(jnp.uint8, E, N, K // 32)
    args = [array(jnp.bfloat16, rows * blocks, K), array(jnp.int32, blocks), array(jnp.int32), w, scale]
    return functools.partial(expert_matmul_gpu, packed=packed, chip=chip), args
