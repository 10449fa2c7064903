"""Programs for `pallas_kernels.aot` to compile: the matrix kernels at given shapes, as make(chip, **sizes)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Chip
from pallas_kernels.expert_matmul.tpu import TpuConfig as ExpertConfig
from pallas_kernels.expert_matmul.tpu import expert_matmul_tpu
from pallas_kernels.fp8_matmul.tpu import TpuConfig, fp8_matmul_tpu, fp8_matmuls_tpu, grouped_output_projection_tpu

CODES = jnp.float8_e4m3fn


def array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def fp8_matmul(chip: Chip, rows: int, N: int, K: int, x="bfloat16", scale="uint8", x_scale="uint8", config=None):
    """x [rows, K], bfloat16 or codes, times w [N, K]."""
    run = functools.partial(fp8_matmul_tpu, chip=chip, config=config and TpuConfig(*config))
    blocks = -(-N // 128), -(-K // 128)
    args = [array(jnp.dtype(x), rows, K), array(CODES, N, K), array(jnp.dtype(scale), *blocks)]
    if x == "float8_e4m3fn":
        args.append(array(jnp.dtype(x_scale), rows, blocks[1]))
        return lambda x, w, scale, x_scale: run(x, w, scale, x_scale=x_scale), args
    return run, args


def fp8_matmuls(chip: Chip, rows: int, columns: list[int], K: int, config=None):
    """x [rows, K] times several weights."""
    weights = [(array(CODES, N, K), array(jnp.uint8, N // 128, K // 128)) for N in columns]
    run = functools.partial(fp8_matmuls_tpu, chip=chip, config=config and TpuConfig(*config))
    return run, [array(jnp.bfloat16, rows, K), weights]


def output_projection(chip: Chip, rows: int, H: int, groups: int, D=512, O=1024, config=None):  # noqa: E741
    """o [1, rows, H, D] with 64 rotary channels."""
    run = functools.partial(
        grouped_output_projection_tpu, groups=groups, chip=chip, config=config and TpuConfig(*config)
    )
    N, K = groups * O, H // groups * D
    tables = [array(jnp.float32, 1, rows, 32)] * 2
    return run, [array(jnp.bfloat16, 1, rows, H, D), *tables, array(CODES, N, K), array(jnp.uint8, N // 128, K // 128)]


def expert_matmul(
    chip: Chip, rows: int, blocks: int, E: int, N: int, K: int, packed=True, config=None, tokens=None, stacks=1
):
    """`blocks` blocks of `rows` rows, or of rows of so many tokens, with FP4 or FP8 weights."""
    w, scale = array(CODES, E, N, K), array(jnp.uint8, E, N // 128, K // 128)
    options: dict[str, Any] = {"packed": packed, "chip": chip, "config": config and ExpertConfig(*config)}
    if packed:
        w, scale = (array(jnp.uint8, E, stacks, N // stacks, K // per) for per in (2, 32))

    def run(x, expert, used, w, scale, **rest):
        if packed:
            w, scale = (a.reshape(E, N, -1) for a in (w, scale))
        return expert_matmul_tpu(x, expert, used, w, scale, stacks=stacks, **options, **rest)

    args = [array(jnp.bfloat16, tokens or rows * blocks, K), array(jnp.int32, blocks), array(jnp.int32), w, scale]
    if not tokens:
        return run, args
    return lambda row, *args: run(*args, row=row), [array(jnp.int32, rows * blocks), *args]
