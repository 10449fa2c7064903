"""Muon for matrices, Adam for everything else, as one optax transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Coefficients of the quintic that drives singular values towards 1 (K. Jordan, "Muon", 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
ADAM_PATHS = ("embed_tokens", "lm_head", "gate.weight", "hc", "position_bias", "weights_proj", "norm", "sinks", "bias")


def orthogonalise(x: jax.Array, steps: int = 5) -> jax.Array:
    """x [..., rows, columns] -> roughly U V' of its singular value decomposition U S V'."""
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


class MuonState(NamedTuple):
    momentum: Any


def scale_by_muon(decay: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised; an entry of the update has a root mean square of 0.2, about Adam's."""

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(gradient, state, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: decay * m + g, state.momentum, gradient)
        ahead = jax.tree.map(lambda m, g: decay * m + g, momentum, gradient)
        scale = lambda x: 0.2 * max(x.shape[-2:]) ** 0.5
        return jax.tree.map(lambda x: orthogonalise(x) * scale(x), ahead), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def make(rate: optax.Schedule, labels: Any) -> optax.GradientTransformation:
    """`labels`: a tree like the parameters, of "muon", "adam" and "frozen"."""
    decayed = optax.add_decayed_weights(0.1, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))
    ends = (decayed, optax.scale_by_learning_rate(rate))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {
                "muon": optax.chain(scale_by_muon(), *ends),
                "adam": optax.chain(optax.scale_by_adam(b1=0.9, b2=0.98), optax.scale(0.5), *ends),
                "frozen": optax.set_to_zero(),
            },
            labels,
        ),
    )


def label(path: str, x: jax.Array) -> str:
    """Which rule a parameter follows, by its path."""
    return "adam" if x.ndim < 2 or any(word in path for word in ADAM_PATHS) else "muon"
