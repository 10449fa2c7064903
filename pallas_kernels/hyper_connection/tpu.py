"""Hyper-connections on TPU: each kernel reads the streams once, and Sinkhorn never leaves registers.

XLA runs Sinkhorn's normalisations as some hundred programs of a few microseconds each, and copies the streams, whose
second-last axis is a quarter of a tile, between layouts. Here a token is a row of N M channels. The mix is computed
with tokens in lanes, [(2 + N) N, tokens], so that each of its elements is a vector that any other may divide.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.fp8_matmul.tpu import split_fp32
from pallas_kernels.hyper_connection.reference import check_shapes

LANES, SUBLANES = 128, 8
ROWS, MIN_ROWS = 128, 16  # tokens of a tile: at most, and a multiple of
CHUNK = 512  # channels worked on at a time
VMEM_SHARE, TILES_SHARE = 0.5, 0.35  # of the vector memory: what a kernel may plan with, and its tiles
BY_CHANNELS = (((1,), (1,)), ((), ()))


def _mix(x_ref, fn_ref, rms_eps: float) -> jax.Array:
    """fp32 [(2 + N) N, tokens] of a tile [tokens, N M]: fn times all values, over their joint RMS."""
    squares: Any = 0.0
    for start in range(0, x_ref.shape[1], LANES):
        squares += jnp.square(x_ref[:, start : start + LANES].astype(jnp.float32))
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=BY_CHANNELS, preferred_element_type=jnp.float32)
    if x_ref.dtype == jnp.bfloat16:  # its products with three exact parts of fn are exact
        parts = split_fp32(fn_ref[...])
        mix = functools.reduce(jnp.add, [dot(parts[i], x_ref[...]) for i in range(3)])
    else:
        mix = dot(fn_ref[...], x_ref[...], precision=jax.lax.Precision.HIGHEST)
    ones = jnp.ones((SUBLANES, LANES), jnp.float32)
    mean = dot(ones, squares, precision=jax.lax.Precision.HIGHEST)[:1] / x_ref.shape[1]
    return mix * jax.lax.rsqrt(mean + rms_eps)


def _sinkhorn(comb: list[list[jax.Array]], iterations: int, eps: float) -> list[list[jax.Array]]:
    """comb[j][k]: logits of one element for many tokens."""
    n = range(len(comb))
    total = lambda xs: functools.reduce(jnp.add, xs)

    def rows(c):
        return [[x * scale for x in row] for row in c for scale in [1 / (total(row) + eps)]]

    def columns(c):
        scales = [1 / (total([c[j][k] for j in n]) + eps) for k in n]
        return [[c[j][k] * scales[k] for k in n] for j in n]

    peaks = [functools.reduce(jnp.maximum, row) for row in comb]
    powers = [[jnp.exp(x - peak) for x in row] for row, peak in zip(comb, peaks, strict=True)]
    start = [[x / total(row) + eps for x in row] for row in powers]
    return jax.lax.fori_loop(0, iterations - 1, lambda _, c: columns(rows(c)), columns(start))


def _collapse_kernel(base_ref, scale_ref, x_ref, fn_ref, out_ref, weights_ref, mix_ref, *, n, iterations, eps, rms_eps):
    rows, M = out_ref.shape
    mix_ref[:, :rows] = _mix(x_ref, fn_ref, rms_eps)
    # An element fills registers, all sublanes alike.
    value = lambda i, section: (
        jnp.broadcast_to(mix_ref[i : i + 1, :], (SUBLANES, LANES)) * scale_ref[section] + base_ref[i]
    )
    pre = [jax.nn.sigmoid(value(k, 0)) + eps for k in range(n)]
    post = [2 * jax.nn.sigmoid(value(n + k, 1)) for k in range(n)]
    comb = [[value((2 + j) * n + k, 2) for k in range(n)] for j in range(n)]
    comb = _sinkhorn(comb, iterations, eps)
    for i, element in enumerate([*pre, *post, *(x for row in comb for x in row)]):
        mix_ref[i : i + 1, :] = element[:1]
    weights = mix_ref[...].T[:rows]  # [tokens, (2 + N) N]
    weights_ref[...] = weights
    for start in range(0, M, CHUNK):
        width = min(CHUNK, M - start)
        terms = [weights[:, j : j + 1] * x_ref[:, pl.ds(j * M + start, width)].astype(jnp.float32) for j in range(n)]
        out_ref[:, pl.ds(start, width)] = functools.reduce(jnp.add, terms).astype(out_ref.dtype)


def _expand_kernel(out_ref, x_ref, weights_ref, new_ref, *, n):
    M, weights = out_ref.shape[1], weights_ref[...]
    for start in range(0, M, CHUNK):
        width = min(CHUNK, M - start)
        out = out_ref[:, pl.ds(start, width)].astype(jnp.float32)
        old = [x_ref[:, pl.ds(j * M + start, width)].astype(jnp.float32) for j in range(n)]
        for k in range(n):
            new = weights[:, n + k : n + k + 1] * out
            for j in range(n):
                new += weights[:, (2 + j) * n + k : (2 + j) * n + k + 1] * old[j]
            new_ref[:, pl.ds(k * M + start, width)] = new.astype(new_ref.dtype)


def _tile(streams: jax.Array, chip: Chip) -> int:
    """Tokens of a tile: what fits in vector memory twice over, with all that a kernel reads and writes of it."""
    B, T, n, M = streams.shape
    token_bytes = 2 * (2 * n + 1) * M * streams.dtype.itemsize
    rows = ROWS
    while rows > MIN_ROWS and rows * token_bytes > TILES_SHARE * chip.vmem_bytes:
        rows //= 2
    return min(rows, -(-B * T // MIN_ROWS) * MIN_ROWS)


def _params(chip: Chip) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=int(VMEM_SHARE * chip.vmem_bytes))


def _check(op: str, streams, chip: Chip) -> None:
    require(chip, op, platform="tpu")
    if streams.shape[3] % LANES:
        raise ValueError(f"{op}: streams {streams.shape} need a multiple of {LANES} channels; use the jnp op")


def collapse_tpu(
    streams: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    *,
    iterations: int,
    eps: float,
    rms_eps: float,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference.collapse` on the TPU `chip`.

    Raises:
      ValueError: the shapes disagree, M is no multiple of 128, or `chip` is not a TPU.
    """
    check_shapes(streams, fn, base, scale)
    _check("collapse_tpu", streams, chip)
    B, T, n, M = streams.shape
    tokens, (elements, channels) = B * T, fn.shape
    rows = _tile(streams, chip)
    x, weights = pl.pallas_call(
        functools.partial(_collapse_kernel, n=n, iterations=iterations, eps=eps, rms_eps=rms_eps),
        grid=(pl.cdiv(tokens, rows),),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((rows, channels), lambda i: (i, 0)),
            pl.BlockSpec((elements, channels), lambda i: (0, 0)),
        ],
        out_specs=[pl.BlockSpec((rows, M), lambda i: (i, 0)), pl.BlockSpec((rows, elements), lambda i: (i, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((tokens, M), streams.dtype),
            jax.ShapeDtypeStruct((tokens, elements), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((elements, LANES), jnp.float32)],
        compiler_params=_params(chip),
        interpret=interpret,
        name="hyper_connection_collapse",
    )(base, scale, streams.reshape(tokens, channels), fn)
    return x.reshape(B, T, M), weights.reshape(B, T, elements)


def expand_tpu(
    out: jax.Array,
    streams: jax.Array,
    weights: jax.Array,
    *,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """`reference.expand` on the TPU `chip`; errors as `collapse_tpu`."""
    B, T, n, M = streams.shape
    if out.shape != (B, T, M) or weights.shape != (B, T, (2 + n) * n):
        raise ValueError(f"expand_tpu: out {out.shape} and weights {weights.shape} do not fit streams {streams.shape}")
    _check("expand_tpu", streams, chip)
    tokens, elements = B * T, weights.shape[2]
    rows = _tile(streams, chip)
    block = lambda width: pl.BlockSpec((rows, width), lambda i: (i, 0))
    new = pl.pallas_call(
        functools.partial(_expand_kernel, n=n),
        grid=(pl.cdiv(tokens, rows),),
        in_specs=[block(M), block(n * M), block(elements)],
        out_specs=block(n * M),
        out_shape=jax.ShapeDtypeStruct((tokens, n * M), streams.dtype),
        compiler_params=_params(chip),
        interpret=interpret,
        name="hyper_connection_expand",
    )(out.reshape(tokens, M), streams.reshape(tokens, n * M), weights.reshape(tokens, elements))
    return new.reshape(streams.shape)
