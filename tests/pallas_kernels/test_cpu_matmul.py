"""Products with stored weights on a CPU, against their plain reference."""

from __future__ import annotations

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cpu_matmul import StoredWeights, stored_matmul
from pallas_kernels.cpu_matmul.cpu import stored_matmul_cpu
from pallas_kernels.formats import decode_e4m3

TOLERANCE = 2e-6  # of the largest sum's terms: float32, in another order
FORMS = ("float32", "bfloat16", "fp8", "fp8, float32 scales", "fp4")


def weights(form: str, E: int, N: int, K: int, seed: int, block=(128, 128)) -> StoredWeights:
    rng = np.random.default_rng(seed)
    if form in ("float32", "bfloat16"):
        return StoredWeights(jnp.asarray(rng.standard_normal((E, N, K)), form))
    if form == "fp4":
        data = rng.integers(0, 256, (E, N, K // 2), np.uint8)
        return StoredWeights(jnp.asarray(data), jnp.asarray(rng.integers(120, 130, (E, N, K // 32), np.uint8)), (1, 32))
    codes = rng.integers(0, 256, (E, N, K), np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E  # no NaN
    grid = E, -(-N // block[0]), -(-K // block[1])
    narrow = jnp.asarray(rng.integers(110, 125, grid, np.uint8))
    scale = narrow if form == "fp8" else jnp.asarray(rng.uniform(0.001, 0.1, grid), jnp.float32)
    return StoredWeights(jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn), scale, block)


@functools.partial(jax.jit, static_argnums=0)
def run(op, x, expert, used, data, scales, blocks):
    parts = zip(data, scales, blocks, strict=True)
    return op(x, None, expert, used, [StoredWeights(d, s, tuple(map(int, b.shape))) for d, s, b in parts])


def both(x, expert, used, held: list[StoredWeights]):
    marks = [jnp.zeros(w.block) for w in held]  # sizes are static
    args = x, jnp.asarray(expert, jnp.int32), jnp.int32(used), [w.data for w in held], [w.scale for w in held], marks
    return run(stored_matmul_cpu, *args), run(stored_matmul, *args)


def assert_close(ours, plain, x, held: list[StoredWeights]):
    for y, z, w in zip(ours, plain, held, strict=True):
        bound = TOLERANCE * float(jnp.abs(x).max() * jnp.abs(w.values()).max()) * x.shape[1] ** 0.5
        np.testing.assert_allclose(y, z, atol=bound, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "E, N, K, blocks, R",
    [
        (1, 512, 256, 1, 1),
        (1, 130, 192, 1, 3),
        (5, 48, 64, 4, 2),
        (16, 512, 512, 8, 1),
        (3, 1, 32, 3, 8),
        (1, 7, 96, 1, 8),
        (1, 130, 192, 1, 9),
        (1, 512, 256, 1, 80),
        (5, 51, 64, 9, 16),
        (3, 24, 512, 7, 48),
        (2, 3, 32, 40, 37),
        (1, 100, 2080, 1, 300),
    ],
)
def test_equals_the_reference(form, E, N, K, blocks, R):
    rng = np.random.default_rng(E * N)
    x = jnp.asarray(rng.standard_normal((blocks * R, K)), jnp.float32)
    held = [weights(form, E, N, K, 0), weights(form, E, N + 9, K, 1)]
    assert_close(*both(x, np.sort(rng.integers(0, E, blocks)), blocks, held), x, held)


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("block", [(16, 32), (128, 128), (64, 48)])
def test_partial_blocks_of_scales(block, rows):
    x = jnp.asarray(np.random.default_rng(2).standard_normal((rows, 200)), jnp.float32)
    held = [weights("fp8", 1, 150, 200, 3, block)]
    assert_close(*both(x, [0], 1, held), x, held)


def test_every_code_is_exact():
    """One row a code: 1 times its value."""
    codes = jnp.arange(256, dtype=jnp.uint8)
    fp8 = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).reshape(1, 256, 1)
    one, used = jnp.ones((1, 1)), jnp.int32(1)
    w = StoredWeights(fp8, jnp.full((1, 2, 1), 127, jnp.uint8))
    got = stored_matmul_cpu(one, None, jnp.zeros(1, jnp.int32), used, [w])[0]
    np.testing.assert_array_equal(got[0], decode_e4m3(fp8[0, :, 0]))
    fp4 = jnp.zeros((1, 16, 16), jnp.uint8).at[0, :, 0].set(codes[:16] | codes[:16] << 4)
    pair = jnp.zeros((1, 32)).at[0, :2].set(jnp.asarray([1.0, 0.5]))
    scale = jnp.full((1, 16, 1), 127, jnp.uint8)
    w = StoredWeights(fp4, scale, (1, 32))
    got = stored_matmul_cpu(pair, None, jnp.zeros(1, jnp.int32), used, [w])[0]
    np.testing.assert_array_equal(got[0], 1.5 * w.values()[0, :, 0])


@pytest.mark.parametrize("scale, value", [(255, np.nan), (254, 2.0**127), (1, 2.0**-126)])
def test_scales_at_the_ends(scale, value):
    w = StoredWeights(jnp.ones((1, 1, 1), jnp.float8_e4m3fn), jnp.full((1, 1, 1), scale, jnp.uint8))
    got = stored_matmul_cpu(jnp.ones((1, 1)), None, jnp.zeros(1, jnp.int32), jnp.int32(1), [w])[0]
    np.testing.assert_array_equal(got, [[value]])


@pytest.mark.parametrize("rows, fewer", [(8, 1), (70, 9)])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_others(form, rows, fewer):
    x = jnp.asarray(np.random.default_rng(4).standard_normal((rows, 512)), jnp.float32)
    held = [weights(form, 1, 300, 512, 5)]
    together, _ = both(x, [0], 1, held)
    for r in range(0, rows - fewer + 1, fewer):
        alone, _ = both(x[r : r + fewer], [0], 1, held)
        np.testing.assert_array_equal(alone[0], together[0][r : r + fewer])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("blocks, R", [(6, 3), (6, 32)])
def test_rows_are_picked(form, blocks, R):
    """By number, the last for those there are not; blocks that are apart may want the same weight."""
    rng = np.random.default_rng(9)
    x, held = jnp.asarray(rng.standard_normal((50, 64)), jnp.float32), [weights(form, 3, 40, 64, 10)]
    row = jnp.asarray(rng.integers(0, 53, blocks * R), jnp.int32)
    expert = jnp.asarray([2, 0, 0, 2, 1, 0], jnp.int32)
    run = lambda op: op(x, row, expert, jnp.int32(blocks), held)
    assert_close(run(stored_matmul_cpu), run(stored_matmul), x, held)


def test_blocks_that_hold_nothing_read_nothing():
    """Their expert may be any number; NaN weights that nobody chose do not show."""
    x = jnp.ones((3, 64))
    data = jnp.full((4, 32, 64), jnp.nan).at[2].set(1.0)
    ours, plain = both(x, [2, 3, 0], 1, [StoredWeights(data)])
    np.testing.assert_array_equal(ours[0][:1], np.full((1, 32), 64.0))
    np.testing.assert_array_equal(plain[0][:1], ours[0][:1])


def test_calls_from_many_threads():
    """Each has its own job; the threads that help take part in all of them."""
    held = [weights("fp8", 1, 2048, 512, 6)]
    xs = [jnp.asarray(np.random.default_rng(i).standard_normal((1, 512)), jnp.float32) for i in range(16)]
    want = [both(x, [0], 1, held)[0][0] for x in xs]

    def work(i: int) -> bool:
        return all((both(xs[i], [0], 1, held)[0][0] == want[i]).all() for _ in range(20))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_batched():
    held = weights("float32", 1, 24, 32, 7)
    xs = jnp.asarray(np.random.default_rng(8).standard_normal((3, 2, 32)), jnp.float32)
    one = lambda op: lambda x: op(x, None, jnp.zeros(1, jnp.int32), jnp.int32(1), [held])[0]
    got, want = (jax.vmap(one(op))(xs) for op in (stored_matmul_cpu, stored_matmul))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "x, held, message",
    [
        ((2, 64), [(jnp.float16, (1, 8, 64))], "not float32, bfloat16, FP8 or FP4"),
        ((2, 64), [(jnp.float8_e4m3fn, (1, 8, 64))], "scale None"),
        ((2, 60), [(jnp.float32, (1, 8, 64))], r"x float32\[2, 60\] does not fit w \[1, 8, 64\]"),
        ((2, 64), [(jnp.float32, (1, 8, 64)), (jnp.bfloat16, (1, 8, 64))], "weights differ in kind"),
    ],
)
def test_refused(x, held, message):
    some = [StoredWeights(jnp.zeros(shape, dtype)) for dtype, shape in held]
    with pytest.raises(ValueError, match=message):
        stored_matmul_cpu(jnp.zeros(x), None, jnp.zeros(1, jnp.int32), jnp.int32(1), some)


def test_fp4_needs_whole_groups():
    w = StoredWeights(jnp.zeros((1, 4, 8), jnp.uint8), jnp.zeros((1, 4, 1), jnp.uint8), (1, 16))
    with pytest.raises(ValueError, match="FP4 has a scale per row and 32 channels"):
        stored_matmul_cpu(jnp.zeros((1, 16)), None, jnp.zeros(1, jnp.int32), jnp.int32(1), [w])
