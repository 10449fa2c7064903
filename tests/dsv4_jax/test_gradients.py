"""The model itself is differentiable: on the portable strategy by jax's own rules, on kernels by their references'."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FULL, GOLDEN, load_model
from jax.tree_util import keystr, tree_leaves_with_path

from dsv4_jax.kernels import resolve_kernels
from dsv4_jax.quantized import QuantizedArray
from pallas_kernels.fp8_matmul.reference import BLOCK

TOKENS = np.random.default_rng(0).integers(1, 190, (1, 40))  # whole blocks of CSA, and no whole tile of any kernel

STEP = 3e-4


def norm(arrays) -> float:
    return float(jnp.sqrt(sum(jnp.vdot(a, a) for a in arrays)))


def loss_of_floats(model):
    """The next-token loss as a function of the model's fp32 arrays and of the rest, and both of them."""
    leaves, structure = jax.tree.flatten(model)
    trained = [leaf.dtype == jnp.float32 for leaf in leaves]
    floats = [leaf for leaf, is_float in zip(leaves, trained, strict=True) if is_float]
    codes = [leaf for leaf, is_float in zip(leaves, trained, strict=True) if not is_float]

    def loss(floats, codes):
        parts = {True: iter(floats), False: iter(codes)}
        model = jax.tree.unflatten(structure, [next(parts[is_float]) for is_float in trained])
        tokens = jnp.asarray(TOKENS, jnp.int32)
        streams, _ = model(tokens, model.init_cache(1), jnp.array([tokens.shape[1]]))
        scores = jax.nn.log_softmax(model.head(streams)[:, :-1])
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

    return jax.jit(loss), floats, codes


@functools.lru_cache(maxsize=2)
def gradient_on(kernels: str):
    loss, floats, codes = loss_of_floats(load_model(GOLDEN / "calm" / "fp8", kernels=kernels, max_tokens=64))
    return jax.jit(jax.value_and_grad(loss))(floats, codes)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["calm/fp8", "tiny/bf16"] if FULL else ["calm/fp8"])
def test_gradient_of_the_portable_model_is_the_slope(case):
    """All layer kinds; between the losses a little to both sides of the weights, in a random direction."""
    model = load_model(GOLDEN / case, max_tokens=64)
    loss, floats, codes = loss_of_floats(model)
    gradient = jax.jit(jax.grad(loss))(floats, codes)
    names = [keystr(path) for path, leaf in tree_leaves_with_path(model) if leaf.dtype == jnp.float32]
    still = [name for name, g in zip(names, gradient, strict=True) if not jnp.any(g != 0)]
    # Drafts are no part of this loss, and a choice (of entries, of experts) has no slope.
    assert [name for name in still if not re.search(r"mtp|indexer|correction_bias", name)] == []
    # Uphill, as a loss near 9 in fp32 resolves no less steep way, and as much of all other ways.
    rng = np.random.default_rng(1)
    noise = [jnp.asarray(rng.normal(size=w.shape), jnp.float32) for w in floats]
    direction = [g / norm(gradient) + n / norm(noise) for g, n in zip(gradient, noise, strict=True)]
    at = lambda t: float(loss([w + t * d for w, d in zip(floats, direction, strict=True)], codes))
    slope = (at(STEP) - at(-STEP)) / (2 * STEP)
    along = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, direction, strict=True))
    assert abs(along - slope) <= 5e-3 * abs(slope)


@pytest.mark.slow
@pytest.mark.interpreter
def test_gradient_on_the_tpu_kernels_is_that_of_the_portable_model():
    (loss, want), (value, got) = gradient_on("xla"), gradient_on("tpu-interpret")
    assert abs(loss - value) <= 1e-5
    for a, b in zip(want, got, strict=True):
        assert float(jnp.abs(a - b).max()) <= 1e-3 * float(jnp.abs(a).max())


@pytest.mark.slow
def test_gradient_of_one_kernel_is_its_references():
    """FP8 projection, in the interpreter: with respect to what goes in; codes and their scales stay as they are."""
    rng = np.random.default_rng(2)
    codes = jnp.asarray(rng.normal(size=(192, 256)), jnp.float8_e4m3fn)
    w = QuantizedArray(codes, jnp.asarray(rng.integers(120, 130, (2, 2)), jnp.uint8), (BLOCK, BLOCK), False)
    x = jnp.asarray(rng.normal(size=(3, 5, 256)), jnp.float32)
    tpu, portable = resolve_kernels("tpu-interpret"), resolve_kernels("xla")
    square = lambda kernels, x: jnp.square(kernels.project(x, w)).sum()
    got, want = (jax.grad(functools.partial(square, kernels))(x) for kernels in (tpu, portable))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))
