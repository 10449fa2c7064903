"""The experts' products for TPU, in the strict interpreter (uninitialised memory is NaN), against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import TPUS, chip
from pallas_kernels.expert_matmul import expert_matmul
from pallas_kernels.expert_matmul.reference import pick_rows
from pallas_kernels.expert_matmul.tpu import TpuConfig, expert_matmul_tpu
from pallas_kernels.expert_matmul.tuning import default_config
from pallas_kernels.formats import decode_e2m1, decode_e8m0, unpack_fp4

pytestmark = pytest.mark.interpreter

BF16, F32, U8, E4M3 = jnp.bfloat16, jnp.float32, jnp.uint8, jnp.float8_e4m3fn
STRICT = pltpu.InterpretParams()
TOLERANCE = {BF16: 2**-8, F32: 2**-20}  # of the largest result: one rounding of it, or sums in another order


def operands(rows: int, experts: list[int], used: int, N: int, K: int, packed: bool, dtype, scale_dtype=U8):
    """Operands with 3 experts, of which the last is poison: its scales give infinities or NaN."""
    rng = np.random.default_rng((rows, N, K))
    x = jnp.asarray(rng.standard_normal((rows * len(experts), K)), dtype)
    shape = (3, N, K // 32) if packed else (3, -(-N // 128), -(-K // 128))
    scale = np.asarray(rng.integers(118, 136, shape) if scale_dtype == U8 else rng.uniform(0.01, 2, shape))
    scale[2] = 255 if scale_dtype == U8 else np.nan
    if packed:
        w = jnp.asarray(rng.integers(0, 256, (3, N, K // 2)), U8)
    else:
        w = jnp.asarray(rng.standard_normal((3, N, K))).astype(E4M3)
    return x, jnp.asarray(experts, jnp.int32), jnp.int32(used), w, jnp.asarray(scale, scale_dtype)


FOLD = TpuConfig(128, True)
# name: chip, rows of a block, expert of each block, blocks used, N, K, packed, type of x, of scales, config
CASES = {
    "one row a block": ("v6e", 1, [1, 0, 2], 2, 256, 512, True, BF16, U8, None),
    "neighbours of one expert": ("v7x", 3, [0, 0, 1, 1], 4, 384, 256, True, BF16, U8, None),
    "e2m1 operands": ("v7x", 1, [1, 0, 2], 2, 256, 768, True, BF16, U8, None),
    "e2m1 operands, many groups": ("v7x", 2, [1, 0], 2, 128, 4352, True, BF16, U8, None),
    "e2m1 operands, float32": ("v7x", 2, [1, 0], 2, 128, 320, True, F32, U8, None),
    "e2m1 operands, scales folded": ("v7x", 16, [1, 0], 2, 256, 512, True, BF16, U8, FOLD),
    "no block used": ("v5p", 2, [2, 2], 0, 256, 256, True, BF16, U8, None),
    "odd sizes": ("v5e", 2, [1, 0], 2, 100, 96, True, BF16, U8, None),
    "float32": ("v6e", 2, [1, 0], 2, 128, 320, True, F32, U8, None),
    "many rows": ("v6e", 16, [0, 1, 1, 2], 3, 256, 512, True, BF16, U8, FOLD),
    "many rows, many groups": ("v5p", 24, [1, 0], 2, 128, 4352, True, BF16, U8, None),
    "groups fill registers": ("v6e", 1, [1, 0], 2, 256, 4096, True, BF16, U8, None),
    "many rows, groups fill registers": ("v5p", 24, [1, 0], 2, 128, 4096, True, BF16, U8, None),
    "many rows, float32": ("v7x", 8, [1, 0], 2, 128, 256, True, F32, U8, None),
    "FP8": ("v6e", 2, [1, 0, 2], 2, 256, 256, False, BF16, U8, None),
    "FP8, float32 scales, odd sizes": ("v7x", 40, [1, 0], 2, 200, 200, False, BF16, F32, None),
    "FP8, many rows": ("v6e", 16, [1, 1, 2], 2, 256, 256, False, BF16, U8, FOLD),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    target, *sizes, config = CASES[name]
    args, packed, (rows, _, used) = operands(*sizes), sizes[5], sizes[:3]
    got = jax.block_until_ready(
        expert_matmul_tpu(*args, packed=packed, chip=chip(target), config=config, interpret=STRICT)
    )
    want = expert_matmul(*args, packed=packed)
    assert got.dtype == want.dtype and got.shape == want.shape
    tolerance = TOLERANCE[want.dtype.type]
    exact = np.asarray(want, np.float64)[: rows * used]
    atol = tolerance * max(np.abs(exact).max(initial=0), 1e-9)
    np.testing.assert_allclose(np.asarray(got, np.float64)[: rows * used], exact, rtol=0, atol=atol)


@pytest.mark.parametrize("case", ["neighbours of one expert", "one row a block", "float32", "many rows", "FP8"])
def test_rows_are_taken_from_where_they_lie(case):
    """As for each row's token; the rows that are none name one past the last."""
    target, *sizes, config = CASES[case]
    (x, expert, used, *weights), packed, rows = operands(*sizes), sizes[5], sizes[0]
    row = np.random.default_rng(0).integers(0, 5, len(x))
    row[rows * int(used) - 1], x = 5, x[:5] if len(x) >= 5 else jnp.concatenate([x, x])[:5]
    row = jnp.asarray(row, jnp.int32)
    run = lambda x, row: expert_matmul_tpu(
        x, expert, used, *weights, row=row, packed=packed, chip=chip(target), config=config, interpret=STRICT
    )
    got, want = jax.block_until_ready(run(x, row)), jax.block_until_ready(run(pick_rows(x, row), None))
    reached = rows * int(used)
    np.testing.assert_array_equal(got[:reached].astype(F32), want[:reached].astype(F32))
    plain = expert_matmul(x, expert, used, *weights, row=row, packed=packed)[:reached].astype(F32)
    atol = TOLERANCE[x.dtype.type] * float(jnp.abs(plain).max())
    np.testing.assert_allclose(got[:reached].astype(F32), plain, rtol=0, atol=atol)


@pytest.mark.parametrize("rows", [1, 16])
def test_stacked_weights_give_the_same(rows):
    """Gate and up lie as two stacks, whose scales are turned each by itself; a stack has several tiles."""
    args = operands(rows, [1, 0, 0], 3, 1024, 512, True, BF16)
    config = TpuConfig(256, rows > 8)
    run = lambda stacks: expert_matmul_tpu(
        *args, packed=True, chip=chip("v6e"), stacks=stacks, config=config, interpret=STRICT
    )
    np.testing.assert_array_equal(*(jax.block_until_ready(run(stacks)).astype(F32) for stacks in (1, 2)))


def test_rows_too_many_to_hold_are_read_block_by_block(monkeypatch):
    args = operands(*CASES["neighbours of one expert"][1:-1])
    run = lambda: jax.block_until_ready(expert_matmul_tpu(*args, packed=True, chip=chip("v6e"), interpret=STRICT))
    held = run()
    monkeypatch.setattr("pallas_kernels.expert_matmul.tpu.HELD_SHARE", 0)
    np.testing.assert_array_equal(run()[:12], held[:12])


@pytest.mark.parametrize("name", ["v6e", "v7x"])
@pytest.mark.parametrize("rows", [1, 16])
def test_every_code_under_many_scales_is_exact(rows, name):
    """Row r of x picks channel r (and r + 16 ..) out of weights that hold all pairs of codes."""
    K = 256
    picks = np.arange(0, K, 5)[: 48 // rows * rows]
    w = jnp.asarray(np.random.default_rng(0).permutation(128 * K // 2).reshape(1, 128, -1) % 256, U8)
    scale = jnp.asarray(np.arange(128 * K // 32).reshape(1, 128, -1) % 200 + 20, U8)
    blocks = len(picks) // rows
    x = jnp.asarray(np.eye(K)[picks], BF16)
    args = x, jnp.zeros(blocks, jnp.int32), jnp.int32(blocks), w, scale
    got = jax.block_until_ready(expert_matmul_tpu(*args, packed=True, chip=chip(name), interpret=STRICT))
    want = decode_e2m1(unpack_fp4(w[0])) * jnp.repeat(decode_e8m0(scale[0]), 32, axis=1)
    np.testing.assert_array_equal(got.astype(F32), np.asarray(want)[:, picks].T)


def test_what_cannot_run_is_refused():
    x, experts, used, w, scale = operands(2, [0, 1], 2, 128, 256, True, BF16)
    run = lambda *args, packed=True, name="v6e": expert_matmul_tpu(*args, packed=packed, chip=chip(name))
    with pytest.raises(ValueError, match="expert_matmul_tpu: no kernel of this kind for H200.*v5e, v5p, v6e, v7x"):
        run(x, experts, used, w, scale, name="H200")
    with pytest.raises(ValueError, match="with packed=False, w must be float8_e4m3fn"):
        run(x, experts, used, w, scale, packed=False)
    with pytest.raises(ValueError, match=r"scale is uint8\[3, 128, 4\]; it must be uint8 \[3, 128, 8\]"):
        run(x, experts, used, w, scale[..., :4])
    with pytest.raises(ValueError, match="of which x .* has a whole number"):
        run(x[:3], experts, used, w, scale)
    with pytest.raises(ValueError, match="x is float16; give bfloat16 or float32"):
        run(x.astype(jnp.float16), experts, used, w, scale)


def test_tiles_divide_the_weights():
    for target in TPUS:
        for rows in (1, 8, 16, 128):
            for N, K in ((4096, 4096), (4096, 2048), (6144, 7168), (7168, 3072), (128, 256)):
                for packed, stacks in ((False, 1), (True, 1), (True, 2)):
                    form = {"packed": packed, "exact_scales": True, "stacks": stacks}
                    config = default_config(chip(target), rows, N, K, **form)
                    part = N // stacks if N > 128 else N
                    assert part % config.columns == 0 and config.columns % 128 == 0


def test_gate_and_up_and_down_as_the_model_calls_them():
    """Stacked gate and up [E, 2, F, M] are one product."""
    F, M, rows = 128, 256, 2
    x, experts, used, w, scale = operands(rows, [1, 0, 2], 2, 2 * F, M, True, BF16)
    run = lambda *args: expert_matmul_tpu(*args, packed=True, chip=chip("v6e"), interpret=STRICT)
    gate, up = jnp.split(run(x, experts, used, w, scale).astype(F32), 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up).astype(BF16)
    down = operands(rows, [1, 0, 2], 2, M, F, True, BF16)
    out = run(hidden, *down[1:])
    assert out.shape == x.shape and jnp.isfinite(out[: rows * 2]).all() and (out[: rows * 2] != 0).any()
