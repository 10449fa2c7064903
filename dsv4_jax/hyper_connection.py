"""Manifold-constrained hyper-connections: N residual streams mixed around every sub-block (architecture 2.1-2.3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import ModelConfig
from dsv4_jax.kernels import StreamKernels, XlaKernels
from dsv4_jax.linear import RMSNorm
from dsv4_jax.streams import stream_mix, weigh_streams


class HyperConnection(nnx.Module):
    """Around one sub-block: `collapse` the streams into its input, `expand` its output back into them."""

    def __init__(self, config: ModelConfig, kernels: StreamKernels = XlaKernels()):  # noqa: B008 - frozen
        n = config.hc_mult
        self.n, self.iterations, self.kernels = n, config.hc_sinkhorn_iters, kernels
        self.eps, self.rms_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nnx.Param(jnp.zeros(((2 + n) * n, n * config.hidden_size), jnp.float32))
        self.base = nnx.Param(jnp.zeros(((2 + n) * n,), jnp.float32))
        self.scale = nnx.Param(jnp.zeros((3,), jnp.float32))

    def collapse(self, streams: jax.Array, norm: RMSNorm | None = None) -> tuple[jax.Array, Any]:
        """[B, T, N, M] -> sub-block input [B, T, M], and the mixing weights in the form `expand` takes them.

        norm: of that input; its eps is that of the streams.
        """
        fn, base, scale = self.fn[...], self.base[...], self.scale[...]
        weight = None if norm is None else norm.weight[...]
        return self.kernels.collapse_streams(
            streams, fn, base, scale, weight, iterations=self.iterations, eps=self.eps, rms_eps=self.rms_eps
        )

    def expand(self, out: jax.Array, streams: jax.Array, mixing: Any) -> jax.Array:
        """A sub-block's output [B, T, M] and the streams before it -> the streams [B, T, N, M] after it."""
        return self.kernels.expand_streams(out, streams, mixing)


class HyperHead(nnx.Module):
    """The last collapse, before the final norm: no Sinkhorn, no way back."""

    def __init__(self, config: ModelConfig):
        self.eps, self.rms_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nnx.Param(jnp.zeros((config.hc_mult, config.hc_mult * config.hidden_size), jnp.float32))
        self.base = nnx.Param(jnp.zeros((config.hc_mult,), jnp.float32))
        self.scale = nnx.Param(jnp.zeros((1,), jnp.float32))

    def __call__(self, streams: jax.Array) -> jax.Array:
        """[B, T, N, M] -> [B, T, M]."""
        mix = stream_mix(streams, self.fn[...], self.rms_eps)
        weights = jax.nn.sigmoid(mix * self.scale[...] + self.base[...]) + self.eps
        return weigh_streams(streams, weights).astype(streams.dtype)
