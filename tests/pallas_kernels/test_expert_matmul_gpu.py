"""The GPU kernel of the experts' products; see test_fp8_matmul_gpu.py on what runs where."""

from __future__ import annotations

import dataclasses

import gpu_cases
import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from gpu_interpreter import InterpretGPUParams

from pallas_kernels.chips import chip
from pallas_kernels.expert_matmul.gpu import expert_matmul_gpu
from pallas_kernels.formats import decode_e2m1, decode_e4m3, decode_e8m0, unpack_fp4
from pallas_kernels.fp8_matmul.gpu_device import expand_text, factor_text, fragment_order, piece_place

pytestmark = pytest.mark.interpreter


E4M3 = jnp.float8_e4m3fn
GPUS = ("H200", "B200")


def operands(rows: int, experts: int, N: int, K: int, packed: bool, seed: int = 0):
    """x [rows, K], w, scale, and w's values in fp32 [E, N, K]."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, K)), jnp.bfloat16)
    if packed:
        w = jnp.asarray(rng.integers(0, 256, (experts, N, K // 2)), jnp.uint8)
        scale = jnp.asarray(rng.integers(118, 136, (experts, N, K // 32)), jnp.uint8)
        return x, w, scale, decode_e2m1(unpack_fp4(w)) * jnp.repeat(decode_e8m0(scale), 32, axis=-1)
    w = jnp.asarray(rng.standard_normal((experts, N, K))).astype(E4M3)
    scale = jnp.asarray(rng.uniform(0.01, 2, (experts, N // 128, K // 128)), jnp.float32)
    return x, w, scale, decode_e4m3(w) * jnp.repeat(jnp.repeat(scale, 128, axis=-1), 128, axis=-2)


# name: chip, cores, rows of a block, expert of each block, blocks used, N, K, packed
CASES = {
    "one row a block, split sums": ("H200", 5, 1, [2, 0, 1], 2, 128, 512, True),
    "24 rows a block": ("H200", 2, 24, [1, 0, 0], 3, 256, 256, True),
    "no block used": ("H200", 1, 8, [1], 0, 128, 256, True),
    "FP8 weights": ("H200", 2, 16, [1, 0], 1, 128, 256, False),
    "Blackwell": ("B200", 2, 9, [0, 1], 1, 128, 512, True),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_sum(name):
    """Unused blocks name an expert whose weights are poison, and give zeros."""
    gpu, cores, rows, experts, used, N, K, packed = CASES[name]
    x, w, scale, values = operands(rows * len(experts), 3, N, K, packed)
    target = dataclasses.replace(chip(gpu), cores=cores)
    args = x, jnp.asarray(experts), jnp.asarray(used), w, scale
    out = jax.block_until_ready(expert_matmul_gpu(*args, packed=packed, chip=target, interpret=InterpretGPUParams()))
    blocks = x.astype(jnp.float32).reshape(len(experts), rows, K)
    want = jnp.einsum("brk,bnk->brn", blocks, values[jnp.asarray(experts)], precision="highest")
    want = np.where(np.arange(len(experts))[:, None, None] < used, want, 0).reshape(-1, N)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(out.astype(np.float32), want, rtol=0, atol=2**-8 * np.abs(want).max())
    np.testing.assert_array_equal(out[used * rows :], 0)


def test_threads_expand_a_tile_to_what_wgmma_reads():
    """All 128 threads of a warpgroup, each with its pieces of a tile that holds every code under every scale byte."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 256, (64, 128)).astype(np.uint8)
    scales = (
        rng.permutation(np.arange(512) % 253).reshape(64, 8).astype(np.uint8)
    )  # up to 2 ** 125: 6 times that is finite
    rows, pieces = np.meshgrid(np.arange(64), np.arange(8), indexing="ij")
    memory = np.empty((512, 16), np.uint8)
    memory[rows * 8 + (pieces ^ rows % 8)] = pairs.reshape(64, 8, 16)
    memory = memory.reshape(-1)
    warp, line, quarter = (x.reshape(-1) for x in np.meshgrid(np.arange(4), np.arange(8), np.arange(4), indexing="ij"))
    got = np.empty((64, 256), np.float32)
    for piece, lower in np.ndindex(2, 2):
        row = warp * 16 + lower * 8 + line
        place = piece_place(warp, line, quarter, piece) + lower * 1024
        words = memory[place[:, None] + np.arange(16)].copy().view(np.uint32)
        both = scales[row, quarter * 2] + scales[row, quarter * 2 + 1].astype(np.uint32) * 256
        factor = ptx.run(factor_text(piece), both)
        for word, pair in np.ndindex(4, 4):
            halves = ptx.run(expand_text(pair), words[:, word], factor)
            column = ((piece * 4 + word) * 4 + pair) * 8 + quarter * 2
            for n in (0, 1):
                got[row, column + n] = np.ascontiguousarray(halves).view(jnp.bfloat16.dtype)[n::2]
    codes, factors = (
        np.asarray(decode_e2m1(unpack_fp4(jnp.asarray(pairs)))),
        np.asarray(decode_e8m0(jnp.asarray(scales))),
    )
    values = codes * np.repeat(factors, 32, axis=1)  # by numpy: XLA on CPU takes subnormals for zero
    order = np.asarray(fragment_order(jnp.arange(256)))
    np.testing.assert_array_equal(got, values[:, order])


def test_fragment_order_keeps_sums():
    a, b = np.random.default_rng(0).integers(-9, 9, (2, 3, 512))
    order = np.asarray(fragment_order(jnp.arange(512)))
    assert sorted(order) == list(range(512)) and (order[:256] < 256).all()
    np.testing.assert_array_equal(
        (fragment_order(jnp.asarray(a)) * fragment_order(jnp.asarray(b))).sum(1), (a * b).sum(1)
    )


@pytest.mark.parametrize("name", ["A100", "v6e"])
def test_other_chips_are_refused_by_name(name):
    x, w, scale, _ = operands(2, 1, 128, 256, True)
    with pytest.raises(ValueError, match=f"expert_matmul_gpu: .*{name}.*H200"):
        expert_matmul_gpu(x, jnp.zeros(2, int), 2, w, scale, packed=True, chip=chip(name))


def test_what_the_kernel_does_not_take_is_refused():
    x, w, scale, _ = operands(2, 1, 128, 256, True)
    blocks = jnp.zeros(2, int)
    bad = {
        "does not fit": (x[:, :128], w, scale),
        "K=128 of 128, packed of 256": (x[:, :128], w[..., :64], scale[..., :4]),
        "e8m0 as uint8": (x, w, scale[..., :4]),
        "give bfloat16": (x.astype(jnp.float32), w, scale),
    }
    for words, (x, w, scale) in bad.items():
        with pytest.raises(ValueError, match=words):
            expert_matmul_gpu(x, blocks, 2, w, scale, packed=True, chip=chip("H200"))


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("packed", [False, True])
def test_lowers_for_cuda_without_a_device(name, packed):
    fn, args = gpu_cases.expert_matmul(chip(name), 16, 20, 256, 4096, 4096, packed)
    assert "mosaic_gpu" in jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
