"""FP8 products for TPU, in the strict interpreter (uninitialised memory is NaN), against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import TPUS, chip
from pallas_kernels.formats import decode_e4m3, decode_e8m0
from pallas_kernels.fp8_matmul import fp8_matmul, grouped_output_projection
from pallas_kernels.fp8_matmul.tpu import TpuConfig, fp8_matmul_tpu, fp8_matmuls_tpu, grouped_output_projection_tpu
from pallas_kernels.fp8_matmul.tuning import default_config

pytestmark = pytest.mark.interpreter

E4M3, BF16, F32, U8 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32, jnp.uint8
STRICT = pltpu.InterpretParams()
TOLERANCE = {BF16: 2**-8, F32: 2**-20}  # of the largest result: one rounding of it, or sums in another order


def blocks(n: int) -> int:
    return -(-n // 128)


def scales(rng, dtype, *shape: int):
    return jnp.asarray(rng.integers(118, 136, shape) if dtype == U8 else rng.uniform(0.01, 2, shape), dtype)


def operands(M: int, N: int, K: int, x_dtype, scale_dtype, x_scale_dtype=U8):
    """x, w, scale, x_scale (None but for codes)."""
    rng = np.random.default_rng((M, N, K))
    x, w = (jnp.asarray(rng.standard_normal(shape)) for shape in ((M, K), (N, K)))
    x_scale = scales(rng, x_scale_dtype, M, blocks(K)) if x_dtype == E4M3 else None
    return x.astype(x_dtype), w.astype(E4M3), scales(rng, scale_dtype, blocks(N), blocks(K)), x_scale


def check(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    tolerance = TOLERANCE[want.dtype.type]
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


SMALL, FOLD = TpuConfig(32, 128, 256, False), TpuConfig(32, 256, 256, True)
# name: chip, M, N, K, types of x, scale, x_scale and the result, config
CASES = {
    "one row": ("v6e", 1, 256, 512, BF16, U8, None, None, None),
    "partial blocks of all sizes": ("v5p", 3, 300, 200, BF16, F32, None, None, None),
    "an odd number of columns": ("v6e", 5, 131, 128, BF16, U8, None, None, None),
    "many tiles": ("v6e", 70, 384, 768, BF16, F32, None, None, SMALL),
    "many tiles, scales folded": ("v6e", 70, 512, 768, BF16, U8, None, F32, FOLD),
    "prefill": ("v5e", 300, 256, 384, BF16, U8, None, None, None),
    "prefill, scales folded": ("v6e", 300, 256, 384, BF16, U8, None, None, None),
    "codes, all scales e8m0": ("v7x", 40, 256, 300, E4M3, U8, U8, None, None),
    "codes, all scales float32": ("v7x", 40, 256, 300, E4M3, F32, F32, None, None),
    "a ragged last tile": ("v7x", 5, 300, 256, BF16, U8, None, None, TpuConfig(16, 128, 256, False)),
    "codes, widened": ("v5e", 40, 256, 512, E4M3, F32, F32, F32, SMALL),
    "codes, scales of rows float32": ("v6e", 300, 256, 256, E4M3, U8, F32, None, None),
    "float32": ("v6e", 9, 256, 300, F32, U8, None, None, None),
    "float32 to bfloat16": ("v7x", 9, 256, 256, F32, F32, None, BF16, None),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    target, M, N, K, x_dtype, scale_dtype, x_scale_dtype, out_dtype, config = CASES[name]
    x, w, scale, x_scale = operands(M, N, K, x_dtype, scale_dtype, x_scale_dtype)
    options = {"x_scale": x_scale, "out_dtype": out_dtype}
    got = jax.block_until_ready(
        fp8_matmul_tpu(x, w, scale, chip=chip(target), config=config, interpret=STRICT, **options)
    )
    check(got, fp8_matmul(x, w, scale, **options))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("target", ["v6e", "v7x"])
def test_every_code_under_many_scales_is_exact(target, fold):
    """x picks single weights out of all 254 finite codes, either zero among them."""
    bits = np.delete(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
    w = jax.lax.bitcast_convert_type(jnp.asarray(np.resize(bits, (256, 256))), E4M3)
    scale = jnp.asarray([[107, 127], [130, 147]], U8)
    config = TpuConfig(256, 256, 256, fold)
    got = jax.block_until_ready(
        fp8_matmul_tpu(jnp.eye(256, dtype=BF16), w, scale, chip=chip(target), config=config, interpret=STRICT)
    )
    want = decode_e4m3(w) * jnp.repeat(jnp.repeat(decode_e8m0(scale), 128, 0), 128, 1)
    np.testing.assert_array_equal(got.astype(F32), want.T)


# chip, rows, columns of each weight, K, types of x and scale, config
TOGETHER = {
    "a batch": ("v5p", 5, (512, 256), 384, BF16, U8, None),
    "many tiles": ("v7x", 20, (512, 256), 512, BF16, F32, TpuConfig(16, 384, 128, False)),
    "prefill, scales folded": ("v6e", 300, (256, 512), 256, BF16, U8, None),
    "float32": ("v6e", 3, (128, 256, 128), 256, F32, U8, None),
    "one has a partial block": ("v5e", 3, (256, 200), 256, BF16, U8, None),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_several_weights_equal_the_reference(name):
    target, M, columns, K, x_dtype, scale_dtype, config = TOGETHER[name]
    x, *_ = operands(M, 128, K, x_dtype, scale_dtype)
    weights = [operands(M, N, K, x_dtype, scale_dtype)[1:3] for N in columns]
    outs = fp8_matmuls_tpu(x, weights, chip=chip(target), config=config, interpret=STRICT)
    for got, (w, scale) in zip(jax.block_until_ready(outs), weights, strict=True):
        check(got, fp8_matmul(x, w, scale))


@pytest.mark.parametrize("scale_dtype", [U8, F32])
@pytest.mark.parametrize("columns", [128, 512, 768])
def test_every_tile_finds_its_scales(columns, scale_dtype):
    """More rows of scales than fill a register, and several steps of channels."""
    x, w, scale, _ = operands(3, 96 * 128, 256, BF16, scale_dtype)
    config = TpuConfig(16, columns, 128, False)
    got = jax.block_until_ready(fp8_matmul_tpu(x, w, scale, chip=chip("v6e"), config=config, interpret=STRICT))
    check(got, fp8_matmul(x, w, scale))


def test_leading_axes_and_no_rows():
    x, w, scale, x_scale = operands(6, 128, 128, E4M3, U8)
    run = lambda x, x_scale: fp8_matmul_tpu(x, w, scale, x_scale=x_scale, chip=chip("v6e"), interpret=STRICT)
    x, x_scale = x.reshape(2, 3, -1), x_scale.reshape(2, 3, -1)
    check(run(x, x_scale), fp8_matmul(x, w, scale, x_scale=x_scale))
    assert run(x[:, :0], x_scale[:, :0]).shape == (2, 0, 128)


def output_operands(B: int, T: int, H: int, D: int, G: int, rank: int, R: int, dtype, scale_dtype=U8):
    rng = np.random.default_rng((B, T, H))
    angle = rng.uniform(0, 6, (B, T, R // 2))
    o = jnp.asarray(rng.standard_normal((B, T, H, D)), dtype)
    w = jnp.asarray(rng.standard_normal((G * rank, H // G * D))).astype(E4M3)
    return o, jnp.cos(angle), jnp.sin(angle), w, scales(rng, scale_dtype, blocks(w.shape[0]), blocks(w.shape[1]))


# name: chip, B, T, H, D, G, rank, R, type of o, of scales, config
OUTPUT_CASES = {
    "one token": ("v6e", 1, 1, 4, 256, 2, 128, 64, BF16, U8, None),
    "a batch": ("v7x", 3, 2, 8, 128, 4, 256, 64, BF16, F32, None),
    "many tiles": ("v5p", 1, 40, 8, 256, 2, 256, 64, BF16, U8, TpuConfig(16, 128, 512, False)),
    "scales folded": ("v6e", 1, 300, 4, 128, 2, 128, 16, BF16, U8, None),
    "one group": ("v5e", 1, 5, 2, 128, 1, 100, 128, BF16, U8, None),
    "narrow heads": ("v6e", 2, 3, 4, 64, 2, 128, 32, BF16, U8, None),
    "groups that share a scale": ("v6e", 1, 5, 4, 128, 4, 32, 64, BF16, F32, None),
    "float32": ("v6e", 1, 5, 4, 128, 2, 128, 64, F32, U8, None),
}


@pytest.mark.parametrize("name", OUTPUT_CASES)
def test_output_projection_equals_the_reference(name):
    target, *sizes, config = OUTPUT_CASES[name]
    args, groups = output_operands(*sizes), sizes[4]
    got = jax.block_until_ready(
        grouped_output_projection_tpu(*args, groups=groups, chip=chip(target), config=config, interpret=STRICT)
    )
    check(got, grouped_output_projection(*args, groups=groups))


def test_what_cannot_run_is_refused():
    x, w, scale, _ = operands(2, 128, 256, BF16, U8)
    with pytest.raises(ValueError, match="fp8_matmul_tpu: no kernel of this kind for H200.*v5e, v5p, v6e, v7x"):
        fp8_matmul_tpu(x, w, scale, chip=chip("H200"))
    with pytest.raises(ValueError, match="x must have 256 channels"):
        fp8_matmul_tpu(x[:, :128], w, scale, chip=chip("v6e"))
    with pytest.raises(ValueError, match="x is float16; give bfloat16 or float32"):
        fp8_matmul_tpu(x.astype(jnp.float16), w, scale, chip=chip("v6e"))
    with pytest.raises(ValueError, match=r"in 3 groups: w must be \[3 \* O"):
        args = output_operands(1, 1, 4, 128, 2, 128, 64, BF16)
        grouped_output_projection_tpu(*args, groups=3, chip=chip("v6e"))
    with pytest.raises(ValueError, match="x must have 128 channels"):
        fp8_matmuls_tpu(x, [(w, scale), (w[:, :128], scale[:, :1])], chip=chip("v6e"))


def test_tiles_divide_the_weights_and_keep_what_belongs_together():
    for target in TPUS:
        for rows in (1, 64, 257, 4096):
            for columns, channels, unit in ((32768, 1024, 128), (1024, 4096, 512), (512, 7168, 128), (1000, 300, 128)):
                for exact in (False, True):
                    config = default_config(chip(target), rows, columns, channels, exact_scales=exact, unit=unit)
                    assert channels % config.channels == 0
                    assert config.channels % unit == 0 or config.channels == channels
                    assert config.rows % 16 == 0 and config.columns % 128 == 0
                    assert columns % config.columns == 0 or columns % 128
