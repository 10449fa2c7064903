"""The queries' norm and rotation for TPU, in the strict interpreter, against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.head_norm import norm_heads, norm_heads_tpu

V6E = chip("v6e")
EPS = 1e-6
STRICT = pltpu.InterpretParams()


def draw(B, T, H, D, R, dtype, seed=0):
    rng = np.random.default_rng((seed, B, T, H))
    angle = rng.uniform(-9, 9, (B, T, R // 2))
    q = rng.standard_normal((B, T, H, D)) * 2.0 ** rng.integers(-6, 6, (B, T, H, 1))
    return jnp.asarray(q, dtype), jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("B", "T", "H", "D", "R", "dtype"),
    [
        (2, 1, 3, 128, 64, "bfloat16"),
        (3, 2, 8, 512, 64, "bfloat16"),
        (1, 130, 6, 256, 128, "bfloat16"),  # two tiles of tokens, the second cut
        (1, 20, 16, 512, 32, "float32"),
    ],
)
def test_equals_the_reference(B, T, H, D, R, dtype):
    args = draw(B, T, H, D, R, dtype)
    want = norm_heads(*args, eps=EPS)
    got = norm_heads_tpu(*args, eps=EPS, chip=V6E, interpret=STRICT)
    assert got.shape == want.shape and got.dtype == want.dtype
    rounding = 2.0**-7 if dtype == "bfloat16" else 1e-6  # sums in another order may tip a rounding
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), rtol=rounding, atol=rounding / 4)


def test_reference_on_a_head_by_hand():
    """Twos over their RMS are ones; a quarter turn sends (1, 1) to (-1, 1)."""
    q, zero, one = jnp.full((1, 1, 1, 8), 2.0), jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2))
    got = norm_heads(q, zero, one, eps=0.0)
    np.testing.assert_allclose(got[0, 0, 0], [1, 1, 1, 1, -1, 1, -1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chip": chip("H100")}, "v5e, v5p, v6e, v7x"),
        ({"q": jnp.ones((2, 1, 3, 96))}, "use the jnp op"),
        ({"cos": jnp.ones((2, 1, 16))}, "do not fit q"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    given = dict(zip(("q", "cos", "sin"), draw(2, 1, 3, 128, 64, "bfloat16"), strict=True))
    options = {"chip": V6E} | given | change
    args = [options.pop(name) for name in given]
    with pytest.raises(ValueError, match=words):
        norm_heads_tpu(*args, eps=EPS, **options)


def make_case(target, B: int, T: int, H: int):
    array = jax.ShapeDtypeStruct
    table = array((B, T, 32), jnp.float32)
    run = lambda *args: norm_heads_tpu(*args, eps=EPS, chip=target)
    return run, (array((B, T, H, 512), jnp.bfloat16), table, table)


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    cases = [
        {"B": B, "T": T, "H": H} for B, T, H in [(1, 1, 64), (8, 1, 64), (8, 5, 128), (1, 2048, 64), (1, 2048, 128)]
    ]
    for report in aot.run_cases([aot.Case(f"{__file__}:make_case", case) for case in cases], name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 1, report
