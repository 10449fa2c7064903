"""Hyper-connections on TPU: each kernel reads the streams once, and Sinkhorn never leaves registers.

XLA runs Sinkhorn's normalisations as some hundred programs of a few microseconds each, and copies the streams, whose
second-last axis is a quarter of a tile, between layouts. Here a token is a row of N M channels. The mix is computed
with tokens in lanes, [(2 + N) N, tokens], so that each of its elements is a vector that any other may divide. fn is
one block: in a decode step XLA brings it to vector memory beforehand, and a block that lies there is not copied.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.hyper_connection.reference import check_shapes
from pallas_kernels.rms_norm.tpu import rms_factor

LANES, SUBLANES = 128, 8
ROWS, MIN_ROWS = 128, 8  # tokens of a tile: at most, and a multiple of
EXPAND_ROWS, GROUP = 32, 16  # tokens of a tile of `expand` at most, and of those worked on at a time
CHUNK = 512  # channels of fn split at a time
UPPER = -(1 << 16)  # the bits of fp32 that bfloat16 has
VMEM_SHARE, TILES_SHARE = 0.5, 0.35  # of the vector memory: what a kernel may plan with, and its tiles
BY_CHANNELS = (((1,), (1,)), ((), ()))


def _mix(x_ref, fn_ref, rms_eps: float) -> jax.Array:
    """fp32 [(2 + N) N, tokens] of a tile [tokens, N M]: fn times all values, over their joint RMS.

    The tile goes through the matrix unit, where fn is held: so the three parts of fn make one product.
    """
    elements, channels = fn_ref.shape
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=BY_CHANNELS, preferred_element_type=jnp.float32)
    mix: Any = 0.0
    for start in range(0, channels, CHUNK):
        part = slice(start, min(start + CHUNK, channels))
        if x_ref.dtype == jnp.bfloat16:  # its products with exact parts of fn are exact
            mix += dot(x_ref[:, part], _split(fn_ref[:, part]))
        else:
            mix += dot(x_ref[:, part], fn_ref[:, part], precision=jax.lax.Precision.HIGHEST)
    mix = (mix * rms_factor(x_ref, rms_eps)).T
    return functools.reduce(jnp.add, [mix[i : i + elements] for i in range(0, len(mix), elements)])


def _split(x: jax.Array) -> jax.Array:
    """fp32 [rows, K] -> bfloat16 [3 rows, K]: three parts, each cut off after 8 bits, that add up to it exactly."""
    cut = lambda x: jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & UPPER, jnp.float32)
    high = cut(x)
    middle = cut(x - high)
    return jnp.concatenate([high, middle, x - high - middle]).astype(jnp.bfloat16)


def _sinkhorn(comb: list[list[jax.Array]], iterations: int, eps: float, unroll: bool) -> list[list[jax.Array]]:
    """comb[j][k]: logits of one element for many tokens."""
    n = range(len(comb))

    def total(xs):  # as a tree, for what follows waits for it
        return xs[0] if len(xs) == 1 else total(xs[: len(xs) // 2]) + total(xs[len(xs) // 2 :])

    def rows(c):
        return [[x * scale for x in row] for row in c for scale in [1 / (total(row) + eps)]]

    def columns(c):
        scales = [1 / (total([c[j][k] for j in n]) + eps) for k in n]
        return [[c[j][k] * scales[k] for k in n] for j in n]

    peaks = [functools.reduce(jnp.maximum, row) for row in comb]
    powers = [[jnp.exp(x - peak) for x in row] for row, peak in zip(comb, peaks, strict=True)]
    start = columns([[x / total(row) + eps for x in row] for row in powers])
    return jax.lax.fori_loop(0, iterations - 1, lambda _, c: columns(rows(c)), start, unroll=unroll)


def _weigh(x_ref, pre: jax.Array, norm_ref, out_ref, rms_eps: float) -> None:
    """out: the streams of a tile times pre [tokens, N], summed; then normed, if there is a norm."""
    rows, M = out_ref.shape
    spread = lambda column: jnp.broadcast_to(column, (rows, LANES))  # once for all channels
    weights = [spread(pre[:, j : j + 1]) for j in range(x_ref.shape[1] // M)]
    for start in range(0, M, LANES):
        terms = [w * x_ref[:, pl.ds(j * M + start, LANES)].astype(jnp.float32) for j, w in enumerate(weights)]
        out_ref[:, start : start + LANES] = functools.reduce(jnp.add, terms).astype(out_ref.dtype)
    if norm_ref is None:
        return
    root = spread(rms_factor(out_ref, rms_eps))
    for start in range(0, M, LANES):
        part = slice(start, start + LANES)
        out_ref[:, part] = (out_ref[:, part].astype(jnp.float32) * root * norm_ref[:, part]).astype(out_ref.dtype)


def _collapse_kernel(base_ref, scale_ref, x_ref, fn_ref, *refs, n, iterations, eps, rms_eps, unroll):
    *norm_refs, out_ref, weights_ref, mix_ref = refs
    rows = out_ref.shape[0]
    mix_ref[:, :rows] = _mix(x_ref, fn_ref, rms_eps)
    # An element fills registers, all sublanes alike.
    value = lambda i, section: (
        jnp.broadcast_to(mix_ref[i : i + 1, :], (SUBLANES, LANES)) * scale_ref[section] + base_ref[i]
    )
    pre = [jax.nn.sigmoid(value(k, 0)) + eps for k in range(n)]
    post = [2 * jax.nn.sigmoid(value(n + k, 1)) for k in range(n)]
    comb = [[value((2 + j) * n + k, 2) for k in range(n)] for j in range(n)]
    for i, element in enumerate(pre):
        mix_ref[i : i + 1, :] = element[:1]
    _weigh(x_ref, mix_ref[: max(n, SUBLANES)].T[:rows], norm_refs[0] if norm_refs else None, out_ref, rms_eps)
    comb = _sinkhorn(comb, iterations, eps, unroll)
    for i, element in enumerate([*post, *(x for row in comb for x in row)]):
        mix_ref[n + i : n + i + 1, :] = element[:1]
    weights_ref[...] = mix_ref[...].T[:rows]  # [tokens, (2 + N) N]


def _expand_kernel(out_ref, x_ref, weights_ref, new_ref, *, n):
    tokens, M = out_ref.shape
    rows = min(tokens, GROUP)

    def group(start):
        at = pl.ds(start, rows)
        weights = weights_ref[at, :]
        spread = lambda i: jnp.broadcast_to(weights[:, i : i + 1], (rows, LANES))  # once for all channels
        post = [spread(n + k) for k in range(n)]
        comb = [[spread((2 + j) * n + k) for k in range(n)] for j in range(n)]
        for lane in range(0, M, LANES):
            out = out_ref[at, lane : lane + LANES].astype(jnp.float32)
            old = [x_ref[at, j * M + lane : j * M + lane + LANES].astype(jnp.float32) for j in range(n)]
            for k in range(n):
                new = post[k] * out
                for j in range(n):
                    new += comb[j][k] * old[j]
                new_ref[at, k * M + lane : k * M + lane + LANES] = new.astype(new_ref.dtype)

    if tokens == rows:
        return group(0)
    pl.loop(0, tokens // rows)(lambda i: group(pl.multiple_of(i * rows, rows)))


def _tile(streams: jax.Array, chip: Chip) -> int:
    """Tokens of a tile: what fits in vector memory twice over, with all that a kernel reads and writes of it."""
    B, T, n, M = streams.shape
    token_bytes = 2 * (2 * n + 1) * M * streams.dtype.itemsize
    rows = ROWS
    while rows > MIN_ROWS and rows * token_bytes > TILES_SHARE * chip.vmem_bytes:
        rows //= 2
    return min(rows, _whole(B * T))


def _whole(tokens: int) -> int:
    """Rows of the least tile that holds so many: a few are a tile of their own, for cutting one takes longer."""
    return tokens if tokens < MIN_ROWS else -(-tokens // MIN_ROWS) * MIN_ROWS


def _expand_tile(streams: jax.Array, chip: Chip) -> int:
    """As `_tile`, but four tiles or more, where they are not too small: each is worked on as others come and go."""
    rows = min(EXPAND_ROWS, _tile(streams, chip))
    while rows > MIN_ROWS and 4 * rows > streams.shape[0] * streams.shape[1]:
        rows //= 2
    return _whole(rows)


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
    norm: jax.Array | None = None,
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
    check_shapes(streams, fn, base, scale, norm)
    _check("collapse_tpu", streams, chip)
    B, T, n, M = streams.shape
    tokens, (elements, channels) = B * T, fn.shape
    rows = _tile(streams, chip)
    sizes: dict[str, Any] = {"n": n, "iterations": iterations, "eps": eps, "rms_eps": rms_eps}
    # Divisions wait for each other, and `_weigh` fits in between; a CPU's compiler takes long over them.
    unroll = interpret is False
    norms = [] if norm is None else [norm.reshape(1, M)]
    block = lambda width: pl.BlockSpec((rows, width), lambda i: (i, 0))
    whole = lambda x: pl.BlockSpec(x.shape, lambda i: (0, 0))
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    x, weights = pl.pallas_call(
        functools.partial(_collapse_kernel, **sizes, unroll=unroll),
        grid=(pl.cdiv(tokens, rows),),
        in_specs=[scalars, scalars, block(channels), *map(whole, [fn, *norms])],
        out_specs=[block(M), block(elements)],
        out_shape=[
            jax.ShapeDtypeStruct((tokens, M), streams.dtype),
            jax.ShapeDtypeStruct((tokens, elements), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((elements, LANES), jnp.float32)],
        compiler_params=_params(chip),
        interpret=interpret,
        name="hyper_connection_collapse",
    )(base, scale, streams.reshape(tokens, channels), fn, *norms)
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
    rows = _expand_tile(streams, chip)
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
