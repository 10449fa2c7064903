"""Programs for `pallas_kernels.aot` to compile: the GPU kernels at given shapes, as make(chip, **sizes)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Chip
from pallas_kernels.expert_matmul.gpu import expert_matmul_gpu
from pallas_kernels.fp8_matmul.gpu import fp8_matmul_gpu, grouped_output_projection_gpu
from pallas_kernels.index_rows import empty_index_rows
from pallas_kernels.index_topk.gpu import index_topk_gpu
from pallas_kernels.kv_rows import empty_rows
from pallas_kernels.sparse_mla import FirstN, Indices, Window
from pallas_kernels.sparse_mla.gpu import sparse_mla_gpu

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


def sparse_mla(chip: Chip, B: int, T: int, H: int, picks: int | None, coded: bool, N: int = 8192, D: int = 512):
    """T queries a sequence, of each `picks` listed entries; None: the first so many. Rows in 8 bits, or bfloat16."""
    rows = lambda n: jax.eval_shape(lambda: empty_rows((B, n, D), 64)) if coded else array(jnp.bfloat16, B, n, D)
    held, some = T + 127, array(jnp.int32, B, T)
    window = Window(rows(held), array(jnp.int32, B, held), 128, is_band=T > 16)
    chosen = FirstN(some) if picks is None else Indices(array(jnp.int32, B, T, picks))
    args = [array(jnp.bfloat16, B, T, H, D), some, window, rows(N), chosen, array(jnp.float32, H)]
    return functools.partial(sparse_mla_gpu, scale=D**-0.5, chip=chip), args


def index_topk(chip: Chip, B: int, T: int, N: int, top_k: int, coded: bool = True):
    """T queries a sequence over N keys, in 4 bits or bfloat16."""
    keys = jax.eval_shape(lambda: empty_index_rows((B, N, 128))) if coded else array(jnp.bfloat16, B, N, 128)
    args = [array(jnp.bfloat16, B, T, 64, 128), array(jnp.bfloat16, B, T, 64), keys, array(jnp.int32, B, T)]
    return functools.partial(index_topk_gpu, top_k=top_k, chip=chip), args
