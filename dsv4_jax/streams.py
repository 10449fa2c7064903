"""The arithmetic of residual streams: how they are mixed into a sub-block's input, and its output back into them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsv4_jax.linear import matmul


def stream_mix(streams: jax.Array, fn: jax.Array, eps: float, product=matmul) -> jax.Array:
    """Streams [B, T, N, M] -> fp32 [B, T, rows of fn]: fn times all N * M values, over their joint RMS.

    product: `linear.matmul`, as a platform does it.
    """
    flat = streams.reshape(*streams.shape[:2], -1).astype(jnp.float32)
    return product(flat, fn) * jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + eps)


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


def collapse(streams, fn, base, scale, *, iterations: int, eps: float, rms_eps: float, product=matmul):
    """[B, T, N, M] -> sub-block input [B, T, M], post fp32 [B, T, N], comb fp32 [B, T, N, N]."""
    mix = stream_mix(streams, fn, rms_eps, product)
    pre, post, comb = split_mix(mix, base, scale, streams.shape[2], iterations, eps)
    return weigh_streams(streams, pre).astype(streams.dtype), post, comb


def expand(out: jax.Array, streams: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
    """post_k * out + sum_j comb[j, k] * stream_j in fp32, rounded once: -> [B, T, N, M]."""
    out = out.astype(jnp.float32)
    mixed = [post[..., k, None] * out + weigh_streams(streams, comb[..., k]) for k in range(streams.shape[2])]
    return jnp.stack(mixed, axis=-2).astype(streams.dtype)
