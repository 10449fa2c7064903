"""The GPU kernels of FP8 products: values in Pallas's interpreter, what it cannot run as arithmetic, machine code.

The interpreter runs loops, copies, barriers and sums; inline code and the layouts of registers it does not know. Of
those, the instructions and addresses themselves are checked here.
"""

from __future__ import annotations

import dataclasses

import gpu_cases
import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from gpu_interpreter import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import chip
from pallas_kernels.fp8_matmul import fp8_matmul, grouped_output_projection
from pallas_kernels.fp8_matmul.gpu import fp8_matmul_gpu, grouped_output_projection_gpu
from pallas_kernels.fp8_matmul.gpu_device import matrix_place, widen_text

pytestmark = pytest.mark.interpreter


E4M3 = jnp.float8_e4m3fn
TOLERANCE = {jnp.bfloat16: 2**-8, jnp.float32: 2**-20}  # of the largest result
GPUS = ("H200", "B200")


def blocks(n: int) -> int:
    return -(-n // 128)


def operands(M: int, N: int, K: int, x_dtype, scale_dtype, seed: int = 0):
    """x, w, scale, x_scale (None for bfloat16)."""
    rng = np.random.default_rng(seed)

    def scales(*shape):
        values = rng.integers(118, 136, shape) if scale_dtype == jnp.uint8 else rng.uniform(0.01, 2, shape)
        return jnp.asarray(values, scale_dtype)

    x, w = (jnp.asarray(rng.standard_normal(shape)) for shape in ((M, K), (N, K)))
    x_scale = scales(M, blocks(K)) if x_dtype == E4M3 else None
    return x.astype(x_dtype), w.astype(E4M3), scales(blocks(N), blocks(K)), x_scale


def small(name: str, cores: int):
    """A chip with fewer cores, for the interpreter to walk through."""
    return dataclasses.replace(chip(name), cores=cores)


# name: chip, cores, M, N, K, type of x, of scales, of the result
CASES = {
    "many rows, two tiles a block": ("H200", 2, 130, 512, 256, E4M3, jnp.uint8, jnp.bfloat16),
    "many rows, partial blocks": ("H200", 2, 70, 300, 300, E4M3, jnp.float32, jnp.bfloat16),
    "codes, one row, split sums": ("H200", 4, 1, 128, 640, E4M3, jnp.float32, jnp.bfloat16),
    "codes to float32": ("H200", 1, 9, 128, 256, E4M3, jnp.uint8, jnp.float32),
    "bf16, one row, split sums": ("H200", 4, 1, 128, 640, jnp.bfloat16, jnp.uint8, jnp.bfloat16),
    "bf16, two row tiles, partial": ("H200", 1, 130, 100, 200, jnp.bfloat16, jnp.float32, jnp.bfloat16),
    "Blackwell, codes": ("B200", 1, 100, 128, 256, E4M3, jnp.uint8, jnp.bfloat16),
    "Blackwell, bf16, split sums": ("B200", 4, 3, 128, 640, jnp.bfloat16, jnp.float32, jnp.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    gpu, cores, M, N, K, x_dtype, scale_dtype, out_dtype = CASES[name]
    x, w, scale, x_scale = operands(M, N, K, x_dtype, scale_dtype)
    options = {"x_scale": x_scale, "out_dtype": out_dtype}
    out = jax.block_until_ready(
        fp8_matmul_gpu(x, w, scale, **options, chip=small(gpu, cores), interpret=InterpretGPUParams())
    )
    want = np.asarray(fp8_matmul(x, w, scale, x_scale=x_scale, out_dtype=jnp.float32))
    assert out.dtype == out_dtype
    np.testing.assert_allclose(out.astype(np.float32), want, rtol=0, atol=TOLERANCE[out_dtype] * np.abs(want).max())


def test_grouped_projection_equals_the_reference():
    rng = np.random.default_rng(1)
    B, T, H, D, G = 1, 3, 4, 256, 2
    o = jnp.asarray(rng.standard_normal((B, T, H, D)), jnp.bfloat16)
    angles = jnp.asarray(rng.uniform(0, 6, (B, T, 32)), jnp.float32)
    _, w, scale, _ = operands(1, G * 128, H // G * D, E4M3, jnp.uint8)
    args = o, jnp.cos(angles), jnp.sin(angles), w, scale
    out = jax.block_until_ready(
        grouped_output_projection_gpu(*args, groups=G, chip=small("H200", 3), interpret=InterpretGPUParams())
    )
    want = np.asarray(grouped_output_projection(*args, groups=G), np.float32)
    assert out.dtype == o.dtype
    np.testing.assert_allclose(out.astype(np.float32), want, rtol=0, atol=2**-7 * np.abs(want).max())


def test_every_code_widens_exactly():
    codes = np.delete(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)  # all but NaN
    words = np.stack([codes, codes[::-1], np.roll(codes, 1), np.roll(codes, 2)], axis=1)
    got = [ptx.run(widen_text(first), words.copy().view(np.uint32)[:, 0]) for first in (0, 2)]
    got = np.stack(got, axis=1).view(jnp.bfloat16.dtype)
    np.testing.assert_array_equal(got.astype(np.float32), words.view(E4M3).astype(np.float32))


@pytest.mark.parametrize("transposed", [False, True])
def test_stored_matrices_lie_as_copies_read_them(transposed):
    """Threads of a warpgroup hold [64, columns] as wgmma's result; four 8 x 8 matrices go to the rows they name."""
    columns = 128 if transposed else 64
    value = np.arange(64 * columns, dtype=np.uint16).reshape(64, columns)
    memory = np.full(64 * columns, 0xFFFF, np.uint16)
    for warp in range(4):
        for column in range(0, columns // 8, 2):
            places = matrix_place(warp * 32 + np.arange(32), column, transposed).reshape(4, 8)
            for matrix, lines in enumerate(places):
                top, left = warp * 16 + matrix % 2 * 8, (column + matrix // 2) * 8
                held = value[top : top + 8, left : left + 8]
                for line, place in enumerate(lines):
                    memory[place // 2 : place // 2 + 8] = held[:, line] if transposed else held[line]
    want = value.T if transposed else value
    rows, pieces = np.meshgrid(np.arange(want.shape[0]), np.arange(8), indexing="ij")
    swizzled = (rows * 8 + (pieces ^ rows % 8))[..., None] * 8 + np.arange(8)
    np.testing.assert_array_equal(memory[swizzled].reshape(want.shape), want)


def test_registers_run_by_columns_then_row_groups():
    """The order in which inline code takes and gives the registers of a wgmma operand."""
    assert [n for n in plgpu.Layout.WGMMA.to_mgpu().registers_shape((64, 256)) if n > 1] == [32, 2]


@pytest.mark.parametrize("name", ["A100", "v5e"])
def test_other_chips_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"fp8_matmul_gpu: .*{name}.*H200"):
        fp8_matmul_gpu(*operands(1, 128, 128, jnp.bfloat16, jnp.uint8)[:3], chip=chip(name))


def test_what_the_kernel_does_not_take_is_refused():
    x, w, scale, _ = operands(2, 128, 256, jnp.bfloat16, jnp.uint8)
    bad = {
        "cast to bfloat16": (x.astype(jnp.float32), w, scale),
        "must have 256 channels": (x[:, :128], w, scale),
        "give uint8": (x, w, scale.astype(jnp.int32)),
    }
    for words, args in bad.items():
        with pytest.raises(ValueError, match=words):
            fp8_matmul_gpu(*args, chip=chip("H200"))
    o, angles = jnp.zeros((1, 1, 4, 64), jnp.bfloat16), jnp.zeros((1, 1, 16))
    with pytest.raises(ValueError, match="64 x 128; pad both"):
        grouped_output_projection_gpu(o, angles, angles, w[:, :128], scale[:, :1], groups=2, chip=chip("H200"))


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("rows", [1, 512])
def test_lowers_for_cuda_without_a_device(name, codes, rows):
    fn, args = gpu_cases.fp8_matmul(chip(name), rows, 1024, 4096, codes)
    assert "mosaic_gpu" in jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
