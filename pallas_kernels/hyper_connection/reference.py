"""The contract of hyper-connections (architecture 2.1-2.3), in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.rms_norm.reference import rms_norm


def collapse(
    streams: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    norm: jax.Array | None = None,
    *,
    iterations: int,
    eps: float,
    rms_eps: float,
) -> tuple[jax.Array, jax.Array]:
    """The input of a sub-block, and the weights with which `expand` returns its output.

    Args:
      streams: [B, T, N, M] bf16 or fp32.
      fn: fp32 [(2 + N) N, N M]; base: fp32 [(2 + N) N]; scale: fp32 [3], for pre, post and comb.
      norm: fp32 [M], the weight of an RMSNorm of the input, rounded before it and after it; None: there is none.
      iterations: of Sinkhorn, the row softmax and its column step being the first; eps: in its denominators, and added
        to pre. rms_eps: in the joint RMS of the N M values, and in that of the norm.
    Returns:
      [B, T, M] in streams.dtype, and fp32 [B, T, (2 + N) N]: pre, post and comb, whose element j N + k carries stream
      j to stream k.
    Raises:
      ValueError: the shapes disagree.
    """
    check_shapes(streams, fn, base, scale, norm)
    n, flat = streams.shape[2], streams.astype(jnp.float32).reshape(*streams.shape[:2], -1)
    mix = jnp.einsum("BTK,HK->BTH", flat, fn, precision="highest")
    mix *= jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1, keepdims=True) + rms_eps)
    pre = jax.nn.sigmoid(mix[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * jax.nn.sigmoid(mix[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mix[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*mix.shape[:2], n, n)
    comb = jax.nn.softmax(comb, axis=-1) + eps
    for i in range(iterations):
        comb = comb / (comb.sum(-1, keepdims=True) + eps) if i else comb
        comb = comb / (comb.sum(-2, keepdims=True) + eps)
    x = jnp.einsum("BTN,BTNM->BTM", pre, streams.astype(jnp.float32), precision="highest").astype(streams.dtype)
    x = x if norm is None else rms_norm(x, norm, eps=rms_eps)
    return x, jnp.concatenate([pre, post, comb.reshape(*mix.shape[:2], -1)], axis=-1)


def expand(out: jax.Array, streams: jax.Array, weights: jax.Array) -> jax.Array:
    """post_k out + sum_j comb_jk stream_j in fp32, rounded once.

    Args:
      out: [B, T, M]; streams: [B, T, N, M]; weights: of `collapse`.
    Returns:
      [B, T, N, M] in streams.dtype.
    """
    n = streams.shape[2]
    post, comb = weights[..., n : 2 * n], weights[..., 2 * n :].reshape(*weights.shape[:2], n, n)
    mixed = jnp.einsum("BTJK,BTJM->BTKM", comb, streams.astype(jnp.float32), precision="highest")
    return (post[..., None] * out.astype(jnp.float32)[:, :, None] + mixed).astype(streams.dtype)


def check_shapes(streams, fn, base, scale, norm) -> None:
    _, _, n, m = streams.shape
    rows = (2 + n) * n
    if norm is not None and norm.shape != (m,):
        raise ValueError(f"hyper_connection: streams {streams.shape} need a norm of {(m,)}; got {norm.shape}")
    if fn.shape != (rows, n * m) or base.shape != (rows,) or scale.shape != (3,):
        raise ValueError(
            f"hyper_connection: streams {streams.shape} need fn {(rows, n * m)}, base {(rows,)} and scale (3,); got "
            f"{fn.shape}, {base.shape} and {scale.shape}"
        )
