"""Rows put in place: the kernel against the reference, and what the compiler makes of it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.kv_rows import quantize_rows
from pallas_kernels.put_rows import put_rows, put_rows_tpu
from pallas_kernels.put_rows.tpu import TILE, WHOLE


def operands(B: int, S: int, K: int, start, count):
    """8-bit rows, and slots from `start` on, around the end, of which `count` are kept."""
    rng = np.random.default_rng(S + K)
    rows = lambda n: quantize_rows(jnp.asarray(rng.normal(size=(B, n, 192)), jnp.bfloat16), 64)
    slots = (np.asarray(start)[:, None] + np.arange(K)) % S
    index = np.where(np.arange(K) < np.asarray(count)[:, None], slots, S)
    return rows(S), rows(K), jnp.asarray(index, jnp.int32)


@pytest.mark.parametrize(
    "S, K, start, count",
    [
        (128, 1, (0, 127, 31), (1, 1, 0)),
        (132, 5, (126, 30, 131), (5, 3, 5)),
        (36, 5, (30, 34, 0), (5, 5, 0)),
        (8, 8, (3, 0, 7), (8, 8, 1)),
        (256, 16, (250, 20, 64), (16, 16, 0)),
    ],
)
@pytest.mark.interpreter
def test_rows_are_put_where_they_belong(S, K, start, count):
    held, rows, index = operands(3, S, K, start, count)
    want = put_rows(held, rows, index)
    strict = S <= WHOLE or S % TILE == 0  # which cannot alias an output whose last tile is cut
    got = put_rows_tpu(held, rows, index, chip=chip("v6e"), interpret=pltpu.InterpretParams() if strict else True)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_every_dtype_that_is_held():
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.uint8):
        held, rows = (jnp.asarray(rng.integers(0, 256, (2, n, 16)), dtype) for n in (40, 2))
        index = jnp.array([[39, 0], [7, 40]], jnp.int32)
        got = put_rows_tpu(held, rows, index, chip=chip("v6e"), interpret=True)
        np.testing.assert_array_equal(got, put_rows(held, rows, index))


@pytest.mark.parametrize("at", (0, 5, 31, 32, 40))
def test_a_single_row(at):
    rng = np.random.default_rng(at)
    held, row = rng.normal(size=(1, 32, 8)), rng.normal(size=(1, 1, 8))
    got = put_rows(jnp.asarray(held), jnp.asarray(row), jnp.array([[at]], jnp.int32))
    if at < 32:  # else it is dropped
        held[:, at] = row[:, 0]
    np.testing.assert_array_equal(got, held.astype(got.dtype))


def test_a_single_row_is_put_in_place_on_a_cpu():
    """In a loop that reads what it writes XLA copied the whole array, up to four times a step."""

    def loop(held, q):
        def step(i, carry):
            held = put_rows(carry[0], carry[1][:, :1], jnp.full((1, 1), i))
            scores = jax.nn.softmax(jnp.einsum("bhd,bsd->bhs", carry[1], held))
            return held, jnp.einsum("bhs,bsd->bhd", scores, held)

        return jax.lax.fori_loop(0, 5, step, (held, q))

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 4096, 64), (1, 8, 64)))
    compiled = jax.jit(loop, donate_argnums=(0, 1)).lower(*shapes).compile()
    assert "scatter(" in compiled.as_text()
    assert not re.search(r"f32\[1,4096,64\]\S* copy\(", compiled.as_text())


def test_refused():
    held, rows, index = operands(1, 64, 17, (0,), (17,))
    with pytest.raises(ValueError, match="17 rows at a time, at most 16; use the jnp op"):
        put_rows_tpu(held, rows, index, chip=chip("v6e"))
    with pytest.raises(ValueError, match="do not fit"):
        put_rows_tpu(held, jax.tree.map(lambda x: x[:, :2], rows), index, chip=chip("v6e"))


def case(target, S: int, K: int):
    abstract = lambda n: jax.eval_shape(lambda: operands(8, n, K, (0,) * 8, (K,) * 8)[0])
    args = abstract(S), abstract(K), jax.ShapeDtypeStruct((8, K), jnp.int32)
    free = Format(Layout.AUTO)  # as in a loop
    options = {"donate_argnums": 0, "in_shardings": (free, None, None), "out_shardings": free}
    return jax.jit(lambda *args: put_rows_tpu(*args, chip=target), **options), args


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_nothing_is_copied(name):
    """A row costs its tile: no temporary, and nothing that XLA does around the kernel grows with what is held."""
    cases = [aot.Case(f"{__file__}:case", {"S": S, "K": K}) for S, K in ((132, 5), (8192, 1), (32768, 1))]
    reports = aot.run_cases(cases, name)
    assert not any("error" in report for report in reports), reports
    assert all(report["bytes"]["temp"] < 1 << 20 for report in reports)
    assert reports[2]["xla_cycles"] < 1.1 * reports[1]["xla_cycles"] + 1000
