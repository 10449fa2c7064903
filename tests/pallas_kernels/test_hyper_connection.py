"""Hyper-connections for TPU, in the strict interpreter (uninitialised memory is NaN), against the reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.hyper_connection import collapse, collapse_tpu, expand, expand_tpu
from pallas_kernels.hyper_connection.cpu import collapse_cpu, expand_cpu
from pallas_kernels.rms_norm import rms_norm

STRICT = pltpu.InterpretParams()
TOLERANCE = {jnp.bfloat16: 2**-8, jnp.float32: 1e-5}  # of the largest value: one rounding, or sums in another order
OPTIONS = {"iterations": 20, "eps": 1e-6, "rms_eps": 1e-6}


def operands(B: int, T: int, n: int, M: int, dtype):
    rng = np.random.default_rng((B, T, n, M))
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    rows = (2 + n) * n
    streams = (normal(B, T, n, M) * jnp.asarray(rng.uniform(0.1, 30, (B, T, 1, 1)))).astype(dtype)
    return streams, normal(rows, n * M) * (n * M) ** -0.5, normal(rows), normal(3)


def near(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    tolerance = TOLERANCE[want.dtype.type] * np.abs(np.asarray(want, np.float64)).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=0, atol=tolerance)


@pytest.mark.interpreter
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(
    ("B", "T", "n", "M", "dtype"),
    [
        (1, 1, 4, 256, jnp.bfloat16),
        (3, 7, 4, 640, jnp.bfloat16),  # tiles are not full, nor is the last chunk of channels
        (1, 130, 2, 128, jnp.bfloat16),  # two tiles of tokens
        (2, 5, 4, 256, jnp.float32),
    ],
)
def test_equals_the_reference(B, T, n, M, dtype, has_norm):
    streams, *mix = operands(B, T, n, M, dtype)
    if has_norm:
        mix.append(1 + mix[0][0, :M])
    want, want_weights = collapse(streams, *mix, **OPTIONS)
    run = lambda streams, mix: collapse_tpu(streams, *mix, **OPTIONS, chip=chip("v6e"), interpret=STRICT)
    x, weights = jax.block_until_ready(run(streams, mix))
    near(x, want)
    near(weights, want_weights)
    comb = np.asarray(weights[..., 2 * n :]).reshape(B, T, n, n)
    np.testing.assert_allclose(comb.sum(-2), 1, atol=1e-5)
    out = x * 2
    got = jax.block_until_ready(expand_tpu(out, streams, want_weights, chip=chip("v6e"), interpret=STRICT))
    near(got, expand(out, streams, want_weights))


def products(streams, fn):
    """What `collapse_cpu` is given of fn."""
    return jnp.einsum("BTK,HK->BTH", streams.reshape(*streams.shape[:2], -1), fn, precision="highest")


@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("B", "T", "n", "M"), [(1, 1, 4, 256), (3, 7, 4, 500), (1, 130, 2, 31), (2, 5, 1, 64)])
def test_a_cpu_equals_the_reference(B, T, n, M, has_norm):
    streams, fn, *mix = operands(B, T, n, M, jnp.float32)
    norm = 1 + fn[0, :M] if has_norm else None
    want, want_weights = collapse(streams, fn, *mix, norm, **OPTIONS)
    x, weights = jax.jit(functools.partial(collapse_cpu, **OPTIONS))(streams, products(streams, fn), *mix, norm)
    near(x, want)
    near(weights, want_weights)
    near(jax.jit(expand_cpu)(2 * x, streams, want_weights), expand(2 * x, streams, want_weights))


def test_a_token_on_a_cpu_does_not_depend_on_others():
    streams, fn, *mix = operands(1, 50, 4, 128, jnp.float32)
    mixed = products(streams, fn)
    run = lambda part: collapse_cpu(streams[:, part], mixed[:, part], *mix, **OPTIONS)
    (x, weights), (alone, own) = run(slice(None)), run(slice(37, 38))
    np.testing.assert_array_equal(x[:, 37:38], alone)
    np.testing.assert_array_equal(weights[:, 37:38], own)


def test_what_a_cpu_cannot_run_is_refused():
    streams, fn, *mix = operands(1, 2, 4, 128, jnp.bfloat16)
    with pytest.raises(ValueError, match="collapse_cpu: float32 streams and products, not bfloat16"):
        collapse_cpu(streams, jnp.zeros((1, 2, 24)), *mix, **OPTIONS)
    with pytest.raises(ValueError, match=r"need a norm of \(128,\); got \(4,\)"):
        collapse_cpu(streams, jnp.zeros((1, 2, 24)), *mix, jnp.ones(4), **OPTIONS)
    with pytest.raises(ValueError, match="expand_cpu: float32, not float32, bfloat16"):
        expand_cpu(jnp.zeros((1, 2, 128)), streams, jnp.zeros((1, 2, 24)))
    with pytest.raises(ValueError, match="do not fit streams"):
        expand_cpu(jnp.zeros((1, 3, 128)), streams, jnp.zeros((1, 2, 24)))


@pytest.mark.interpreter
def test_the_norm_is_of_the_rounded_input():
    """Hardly an element is another, as a third would be if the sum were not rounded first."""
    streams, *mix = operands(2, 9, 4, 384, jnp.bfloat16)
    run = functools.partial(collapse_tpu, **OPTIONS, chip=chip("v6e"), interpret=STRICT)
    norm = 1 + mix[0][1, :384]
    x, weights = jax.block_until_ready(run(streams, *mix))
    normed, same = jax.block_until_ready(run(streams, *mix, norm))
    assert (normed == rms_norm(x, norm, eps=OPTIONS["rms_eps"])).mean() > 0.99
    np.testing.assert_array_equal(same, weights)


def test_what_cannot_run_is_refused():
    streams, *mix = operands(1, 1, 4, 128, jnp.bfloat16)
    with pytest.raises(ValueError, match="collapse_tpu: no kernel of this kind for H200.*v5e, v5p, v6e, v7x"):
        collapse_tpu(streams, *mix, **OPTIONS, chip=chip("H200"))
    with pytest.raises(ValueError, match=r"need fn \(24, 512\), base \(24,\)"):
        collapse_tpu(streams, mix[0][:, 1:], *mix[1:], **OPTIONS, chip=chip("v6e"))
    with pytest.raises(ValueError, match=r"need a norm of \(128,\); got \(4,\)"):
        collapse_tpu(streams, *mix, jnp.ones(4), **OPTIONS, chip=chip("v6e"))
    with pytest.raises(ValueError, match="a multiple of 128 channels"):
        expand_tpu(jnp.zeros((1, 1, 8)), jnp.zeros((1, 1, 4, 8)), jnp.zeros((1, 1, 24)), chip=chip("v6e"))
    with pytest.raises(ValueError, match="do not fit streams"):
        expand_tpu(jnp.zeros((1, 2, 128)), streams, jnp.zeros((1, 1, 24)), chip=chip("v6e"))


def make_case(target, B: int, T: int, M: int):
    """What lies between two sub-blocks, for `aot`: expand, then collapse."""
    array, f32 = jax.ShapeDtypeStruct, jnp.float32
    args = array((B, T, M), jnp.bfloat16), array((B, T, 4, M), jnp.bfloat16), array((B, T, 24), f32)
    args += array((24, 4 * M), f32), array((24,), f32), array((3,), f32), array((M,), f32)

    def run(out, streams, weights, *mix):
        streams = expand_tpu(out, streams, weights, chip=target)
        return streams, collapse_tpu(streams, *mix, **OPTIONS, chip=target)

    return run, args


AOT_CASES = [{"B": B, "T": T, "M": M} for M in (4096, 7168) for B, T in ((8, 1), (1, 512))]


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    for report in aot.run_cases([aot.Case(f"{__file__}:make_case", case) for case in AOT_CASES], name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 2, report
