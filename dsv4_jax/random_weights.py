"""Random weights for an abstract model: for tests, notebooks and training from scratch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.linear import Buffer
from dsv4_jax.model import DeepseekV4
from dsv4_jax.quantized import QuantizedArray


def random_weights(build: Callable[[], DeepseekV4], *, seed: int = 0) -> DeepseekV4:
    """A model whose matrices are normal with variance 1 / fan-in, made in one compiled call.

    Vectors (norms, sinks, biases, scales) get a small spread around their neutral value.

    Raises:
      ValueError: the model has quantised weights; `checkpoints.synth` writes random ones of those.
    """
    model = jax.eval_shape(build)
    variables, structure = jax.tree.flatten(model, is_leaf=lambda x: isinstance(x, nnx.Variable))
    if any(isinstance(v.get_value(), QuantizedArray) for v in variables):
        raise ValueError("random_weights makes unquantised models; use checkpoints.synth for quantised ones")
    trained = [i for i, v in enumerate(variables) if isinstance(v, (nnx.Param, Buffer))]

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(trained))
        return [_draw(k, variables[i], model.config.n_routed_experts) for k, i in zip(keys, trained, strict=True)]

    for i, value in zip(trained, draw(jax.random.key(seed)), strict=True):
        variables[i] = variables[i].replace(value)
    model = jax.tree.unflatten(structure, variables)
    model.rope_main.fill()
    model.rope_compress.fill()
    return model


def _draw(key: jax.Array, variable: nnx.Variable, experts: int) -> jax.Array:
    shape, dtype = variable.get_value().shape, variable.get_value().dtype
    if isinstance(variable, Buffer):  # the hash routing table: distinct experts per token
        scores = jax.random.uniform(key, (shape[0], experts))
        return jax.lax.top_k(scores, shape[1])[1].astype(jnp.int32)
    noise = jax.random.normal(key, shape, jnp.float32)
    if len(shape) == 1:
        return (1 + 0.1 * noise).astype(dtype)
    return (noise * shape[-1] ** -0.5).astype(dtype)
