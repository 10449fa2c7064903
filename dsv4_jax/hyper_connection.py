"""Manifold-constrained hyper-connections: N residual streams mixed around every sub-block (architecture 2.1-2.3)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import ModelConfig
from dsv4_jax.linear import matmul


def stream_mix(streams: jax.Array, fn: jax.Array, eps: float) -> jax.Array:
    """Streams [B, T, N, M] -> fp32 [B, T, rows of fn]: fn times all N * M values, over their joint RMS."""
    flat = streams.reshape(*streams.shape[:2], -1).astype(jnp.float32)
    return matmul(flat, fn) * jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + eps)


def sinkhorn(logits: jax.Array, iterations: int, eps: float) -> jax.Array:
    """[..., N, N] -> nearly doubly stochastic: row softmax, column step, then (row, column) iterations - 1 times.

    The order, eps in every denominator and the closing column step are the model's definition.
    """
    columns = lambda c: c / (c.sum(-2, keepdims=True) + eps)
    rows = lambda c: c / (c.sum(-1, keepdims=True) + eps)
    start = columns(jax.nn.softmax(logits, axis=-1) + eps)
    return jax.lax.fori_loop(0, iterations - 1, lambda _, c: columns(rows(c)), start)


def split_mix(mix, base, scale, n: int, iterations: int, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """fp32 [..., (2 + n) * n] -> pre [..., n], post [..., n], comb [..., n, n]; comb[j, k] carries stream j to k."""
    pre = jax.nn.sigmoid(mix[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * jax.nn.sigmoid(mix[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = mix[..., 2 * n :] * scale[2] + base[2 * n :]
    return pre, post, sinkhorn(comb.reshape(*comb.shape[:-1], n, n), iterations, eps)


def weigh_streams(streams: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over j of weights[..., j] * streams[..., j, :], in fp32; unrolled so that it fuses."""
    terms = [weights[..., j, None] * streams[..., j, :].astype(jnp.float32) for j in range(streams.shape[-2])]
    return functools.reduce(jnp.add, terms)


class HyperConnection(nnx.Module):
    """Around one sub-block: `collapse` the streams into its input, `expand` its output back into them."""

    def __init__(self, config: ModelConfig):
        n = config.hc_mult
        self.n, self.iterations = n, config.hc_sinkhorn_iters
        self.eps, self.rms_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nnx.Param(jnp.zeros(((2 + n) * n, n * config.hidden_size), jnp.float32))
        self.base = nnx.Param(jnp.zeros(((2 + n) * n,), jnp.float32))
        self.scale = nnx.Param(jnp.zeros((3,), jnp.float32))

    def collapse(self, streams: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, N, M] -> sub-block input [B, T, M], post fp32 [B, T, N], comb fp32 [B, T, N, N]."""
        mix = stream_mix(streams, self.fn[...], self.rms_eps)
        pre, post, comb = split_mix(mix, self.base[...], self.scale[...], self.n, self.iterations, self.eps)
        return weigh_streams(streams, pre).astype(streams.dtype), post, comb

    def expand(self, out: jax.Array, streams: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
        """post_k * out + sum_j comb[j, k] * stream_j in fp32, rounded once: -> [B, T, N, M]."""
        out = out.astype(jnp.float32)
        mixed = [post[..., k, None] * out + weigh_streams(streams, comb[..., k]) for k in range(self.n)]
        return jnp.stack(mixed, axis=-2).astype(streams.dtype)


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
