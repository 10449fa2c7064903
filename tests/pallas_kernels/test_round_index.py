"""Rounded index queries for TPU, in the strict interpreter, against the reference.

The transform's sums have another order: with whole numbers the two agree bit for bit, else a rounding may tip.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.formats import fp4_scale, hadamard, unpack_fp4
from pallas_kernels.fp8_matmul.reference import turn
from pallas_kernels.index_rows import dequantize_index_rows
from pallas_kernels.round_index import encode_index, encode_index_tpu, rotated_index, round_index_tpu

V6E = chip("v6e")
STRICT = pltpu.InterpretParams()


def turns(shape, R, rng):
    """cos, sin [*shape, R / 2]; quarter turns keep whole numbers whole."""
    quarters = rng.integers(0, 4, (*shape, R // 2))
    return tuple(jnp.asarray(f(quarters * np.pi / 2).round(), jnp.float32) for f in (np.cos, np.sin))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("shape", "tables"),
    [
        ((1, 128), (1,)),
        ((2, 3, 5, 128), (2, 3, 1)),  # too few heads a token for whole registers
        ((64, 128), (64,)),
        ((100, 128), (1,)),  # one rotation for all
        ((2, 9, 64, 128), (2, 9, 1)),  # two tiles of tokens, the second cut
        ((8, 1, 128), (8, 1)),
    ],
)
def test_equals_the_reference(shape, tables, dtype):
    rng = np.random.default_rng(len(shape))
    angle = rng.uniform(-9, 9, (*tables, 32))
    any_turn = tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    whole = rng.integers(-8, 9, shape) * 2.0 ** rng.integers(-9, 9, (*shape[:-1], 1))
    for x, table, tipped in ((whole, turns(tables, 64, rng), 0.0), (rng.standard_normal(shape), any_turn, 2e-3)):
        x = jnp.asarray(x, dtype)
        got = round_index_tpu(x, *table, chip=V6E, interpret=STRICT)
        assert got.dtype == x.dtype and got.shape == x.shape
        got, want = (np.asarray(a, np.float32) for a in (got, rotated_index(x, *table)))
        assert (got != want).mean() <= tipped
        np.testing.assert_allclose(got, want, atol=0.5 * np.abs(want).max())


@pytest.mark.interpreter
def test_zeros_stay_and_a_constant_is_one_channel():
    x = jnp.zeros((2, 128), jnp.bfloat16).at[1].set(3)
    got = round_index_tpu(x, jnp.ones((2, 32)), jnp.zeros((2, 32)), chip=V6E, interpret=STRICT).astype(jnp.float32)
    assert (got[0] == 0).all() and (got[1, 1:] == 0).all()
    assert abs(got[1, 0] / (3 * 128**0.5) - 1) < 0.2  # to one bit of mantissa


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 128), (8, 1, 128), (100, 128)])
def test_encoded_equals_the_reference(shape, dtype):
    """Whole numbers byte for byte; every code is among them, and scales halved, for what was rounded down to 3 of 6."""
    rng = np.random.default_rng(len(shape))
    whole = rng.integers(-8, 9, shape) * 2.0 ** rng.integers(-9, 9, (*shape[:-1], 1))
    whole[0, ..., :] = 0
    table = turns(shape[:-1], 64, rng)
    for x, tipped in ((whole, 0.0), (rng.standard_normal(shape), 4e-3)):
        x = jnp.asarray(x, dtype)
        got, want = encode_index_tpu(x, *table, chip=V6E, interpret=STRICT), encode_index(x, *table)
        assert got.dim == want.dim and got.data.dtype == jnp.uint8 and got.data.shape == want.data.shape
        assert (got.data != want.data).mean() <= tipped
        wide = [np.asarray(dequantize_index_rows(a, jnp.float32)) for a in (got, want)]
        np.testing.assert_allclose(*wide, atol=0.5 * np.abs(wide[1]).max())
        if len(shape) == 2 and shape[0] > 1:
            codes, groups = np.unique(unpack_fp4(got.data[:, :64])), np.asarray(hadamard(turn(x, *table)), np.float32)
            byte = fp4_scale(np.abs(groups.reshape(-1, 4, 32)).max(-1))
            assert len(codes) == 16 and (got.data[:, 64:] < byte).any()


def test_reference_turns_before_it_transforms():
    """A quarter turn moves channel 2 to channel 3, whose column of Hadamard's matrix the transform gives."""
    x = jnp.zeros((4,)).at[2].set(6.0)
    got = rotated_index(x, jnp.zeros((1,)), jnp.ones((1,)))
    np.testing.assert_array_equal(got, [3, -3, -3, 3])


@pytest.mark.parametrize(
    ("x", "table", "target", "words"),
    [
        ((2, 64), (2, 16), "v6e", "use the jnp op"),
        ((2, 128), (3, 16), "v6e", "do not fit x"),
        ((2, 128), (2, 16), "H100", "v5e, v5p, v6e, v7x"),
    ],
)
def test_what_does_not_fit_is_refused(x, table, target, words):
    with pytest.raises(ValueError, match=words):
        round_index_tpu(jnp.ones(x), jnp.ones(table), jnp.ones(table), chip=chip(target))


def make_encode_case(target, rows: int):
    table = jax.ShapeDtypeStruct((rows, 1, 32), jnp.float32)
    run = lambda *args: encode_index_tpu(*args, chip=target)
    return run, (jax.ShapeDtypeStruct((rows, 1, 128), jnp.bfloat16), table, table)


def make_case(target, tokens: int, heads: int):
    table = jax.ShapeDtypeStruct((tokens, 1, 32), jnp.float32)
    run = lambda *args: round_index_tpu(*args, chip=target)
    return run, (jax.ShapeDtypeStruct((tokens, heads, 128), jnp.bfloat16), table, table)


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    cases = [{"tokens": n, "heads": h} for n, h in ((1, 1), (1, 64), (8, 64), (40, 64), (2048, 64), (8, 1), (512, 1))]
    cases = [aot.Case(f"{__file__}:make_case", case) for case in cases]
    cases += [aot.Case(f"{__file__}:make_encode_case", {"rows": rows}) for rows in (1, 8, 13, 64, 512)]
    for report in aot.run_cases(cases, name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 1, report
