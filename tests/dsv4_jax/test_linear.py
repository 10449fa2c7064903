"""`matmul` of few rows, which a CPU does with its operands in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.linear import FEW_ROWS, linear, matmul


@pytest.mark.parametrize("shape", [(1, 1), (2,), (2, 3), (64,), (FEW_ROWS,), (FEW_ROWS + 1,)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
def test_any_number_of_rows(shape, dtype):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((*s, 96)), dtype) for s in (shape, (40,)))
    wide = [np.asarray(a, np.float64) for a in (x, w)]
    want = wide[0] @ wide[1].T
    for got in (matmul(x, w), jax.jit(matmul)(x, w)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert linear(x, w).dtype == dtype


def test_few_rows_are_differentiable():
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 16), (8, 16)))
    got = jax.grad(lambda x, w: matmul(x, w).sum(), argnums=(0, 1))(x, w)
    np.testing.assert_allclose(got[0], jnp.broadcast_to(w.sum(0), x.shape), rtol=1e-5)
    np.testing.assert_allclose(got[1], jnp.broadcast_to(x.sum(0), w.shape), rtol=1e-5)


def test_on_a_cpu_the_weight_comes_first():
    """In the compiled program: [N, K] is an operand as it lies, and no row is a product of its own."""
    x, w = jnp.zeros((4, 256), jnp.float32), jnp.zeros((512, 256), jnp.float32)
    text = jax.jit(matmul).lower(x, w).compile().as_text()
    assert "f32[512,4]" in text, text
