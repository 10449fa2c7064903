"""Hyper-connections on a CPU: a call each for what XLA makes dozens of small operations of."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from numba import carray, cfunc, njit, types

from pallas_kernels import cpu_call as call
from pallas_kernels.hyper_connection.reference import check_shapes

LANES = 16  # tokens whose Sinkhorn iterations run beside each other, and that a thread claims at a time
TASKS, TARGETS = ("dsv4_collapse_task", "dsv4_expand_task"), ("dsv4_collapse", "dsv4_expand")
FAST = {"reassoc", "contract", "nsz"}


def collapse_cpu(
    streams: jax.Array,
    mix: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    norm: jax.Array | None = None,
    *,
    iterations: int,
    eps: float,
    rms_eps: float,
) -> tuple[jax.Array, jax.Array]:
    """`collapse` in float32, with fn's product [B, T, (2 + N) N] made already, not yet over the streams' RMS.

    Raises ValueError for shapes that disagree or streams that are not float32.
    """
    B, T, N, M = streams.shape
    check_shapes(streams, jax.ShapeDtypeStruct((mix.shape[-1], N * M), jnp.float32), base, scale, norm)
    if {streams.dtype, mix.dtype} != {jnp.dtype(jnp.float32)}:
        raise ValueError(f"collapse_cpu: float32 streams and products, not {streams.dtype} and {mix.dtype}")
    out = jax.ShapeDtypeStruct((B * T, M), jnp.float32), jax.ShapeDtypeStruct(mix.shape, jnp.float32)
    numbers = jnp.asarray([eps, rms_eps], jnp.float32), jnp.asarray([iterations], jnp.int32)
    run = jax.ffi.ffi_call(TARGETS[0], out, vmap_method="sequential")
    x, weights = run(streams.reshape(B * T, N, M), mix, base, scale, *numbers, *(() if norm is None else (norm,)))
    return x.reshape(B, T, M), weights


def expand_cpu(out: jax.Array, streams: jax.Array, weights: jax.Array) -> jax.Array:
    """`expand` in float32. Raises ValueError for shapes that disagree or operands that are not float32."""
    B, T, N, M = streams.shape
    if out.shape != (B, T, M) or weights.shape != (B, T, (2 + N) * N):
        raise ValueError(f"expand_cpu: {out.shape} and weights {weights.shape} do not fit streams {streams.shape}")
    if {x.dtype for x in (out, streams, weights)} != {jnp.dtype(jnp.float32)}:
        raise ValueError(f"expand_cpu: float32, not {out.dtype}, {streams.dtype} and {weights.dtype}")
    run = jax.ffi.ffi_call(TARGETS[1], jax.ShapeDtypeStruct((B * T, N, M), jnp.float32), vmap_method="sequential")
    return run(streams.reshape(B * T, N, M), out.reshape(B * T, M), weights).reshape(streams.shape)


@njit
def _floats(buffer, first, count):
    """Values [first, first + count) of a buffer."""
    return carray(call.as_pointer(call.data(buffer) + 4 * first), (count,), np.float32)


@njit
def _sizes(frame):
    """Tokens, N, M."""
    streams = call.argument(frame, 0)
    return call.dim(streams, 0), call.dim(streams, 1), call.dim(streams, 2)


@njit(fastmath=FAST)
def _mean_square(x):
    total = np.float32(0)
    for k in range(len(x)):
        total += x[k] * x[k]
    return total / np.float32(len(x))


@njit
def _root(x, eps):
    """1 over the RMS."""
    return np.float32(1) / np.float32(math.sqrt(_mean_square(x) + eps))


@njit
def _sigmoid(x):
    return np.float32(1) / (np.float32(1) + np.float32(math.exp(-x)))


@njit(error_model="numpy")  # no test for zeros, which would keep it out of vectors
def _sinkhorn(comb, sums, n, iterations, eps, count):
    """Softmaxes [n n, count] of rows -> nearly doubly stochastic, in turns by columns and by rows, columns last."""
    for turn in range(2 * iterations - 1):
        across, along = (n, 1) if turn % 2 == 0 else (1, n)  # steps from one term to the next, from sum to sum
        for k in range(n):
            for lane in range(count):
                sums[lane] = eps
            for j in range(n):
                for lane in range(count):
                    sums[lane] += comb[k * along + j * across, lane]
            for j in range(n):
                for lane in range(count):
                    comb[k * along + j * across, lane] /= sums[lane]


@njit
def _gates(mix, root, base, scale, n, eps, comb, lane):
    """One token's pre and post in place of the products they come from, and the softmax of comb's rows to a lane."""
    for h in range(2 * n):
        gate = _sigmoid(mix[h] * root * scale[h // n] + base[h])
        mix[h] = gate + eps if h < n else np.float32(2) * gate
    for j in range(2, 2 + n):
        row = mix[j * n : (j + 1) * n]
        peak, total = np.float32(-np.inf), np.float32(0)
        for k in range(n):
            row[k] = row[k] * root * scale[2] + base[j * n + k]
            peak = max(peak, row[k])
        for k in range(n):
            row[k] = np.float32(math.exp(row[k] - peak))
            total += row[k]
        for k in range(n):
            comb[(j - 2) * n + k, lane] = row[k] / total + eps


@njit
def _weigh(streams, weights, step, out):
    """Sum of N streams [N M], each times its weight, every `step`th of `weights`."""
    M = len(out)
    n = len(streams) // M
    for k in range(M):
        out[k] = weights[0] * streams[k]
    for j in range(1, n):
        weight, stream = weights[j * step], streams[j * M : (j + 1) * M]
        for k in range(M):
            out[k] += weight * stream[k]


@njit
def _collapse(frame, unit, comb, sums):
    tokens, n, M = _sizes(frame)
    first, rows = unit * LANES, (2 + n) * n
    count = min(LANES, tokens - first)
    streams, out, mixed = call.argument(frame, 0), call.result(frame, 0), call.result(frame, 1)
    base, scale = _floats(call.argument(frame, 2), 0, rows), _floats(call.argument(frame, 3), 0, 3)
    eps, rms_eps = _floats(call.argument(frame, 4), 0, 2)
    iterations = carray(call.as_pointer(call.data(call.argument(frame, 5))), (1,), np.int32)[0]
    for t in range(count):
        mix, row = _floats(mixed, (first + t) * rows, rows), _floats(streams, (first + t) * n * M, n * M)
        mix[:] = _floats(call.argument(frame, 1), (first + t) * rows, rows)
        _gates(mix, _root(row, rms_eps), base, scale, n, eps, comb, t)
        x = _floats(out, (first + t) * M, M)
        _weigh(row, mix, 1, x)
        if call.arguments(frame) > 6:
            root, norm = _root(x, rms_eps), _floats(call.argument(frame, 6), 0, M)
            for k in range(M):
                x[k] = x[k] * root * norm[k]
    _sinkhorn(comb, sums, n, iterations, eps, count)
    for t in range(count):
        _floats(mixed, (first + t) * rows + 2 * n, n * n)[:] = comb[:, t]


@njit
def _expand(frame, token):
    _, n, M = _sizes(frame)
    rows = (2 + n) * n
    streams = _floats(call.argument(frame, 0), token * n * M, n * M)
    out = _floats(call.argument(frame, 1), token * M, M)
    weights = _floats(call.argument(frame, 2), token * rows, rows)
    for k in range(n):
        mixed = _floats(call.result(frame, 0), (token * n + k) * M, M)
        _weigh(streams, weights[2 * n + k :], n, mixed)
        post = weights[n + k]
        for m in range(M):
            mixed[m] += post * out[m]


@njit
def _work_collapse(job):
    frame = call.frame_of(job)
    unit = call.claim(job)
    if unit < 0:
        return
    n = _sizes(frame)[1]
    comb, sums = np.ones((n * n, LANES), np.float32), np.empty(LANES, np.float32)
    while unit >= 0:
        _collapse(frame, unit, comb, sums)
        call.finish(job)
        unit = call.claim(job)


@njit
def _work_expand(job):
    unit = call.claim(job)
    while unit >= 0:
        frame = call.frame_of(job)
        for token in range(unit * LANES, min((unit + 1) * LANES, _sizes(frame)[0])):
            _expand(frame, token)
        call.finish(job)
        unit = call.claim(job)


@cfunc(types.void(types.int64), cache=True)
def _help_collapse(job):
    _work_collapse(job)
    call.leave(job)


@cfunc(types.void(types.int64), cache=True)
def _help_expand(job):
    _work_expand(job)
    call.leave(job)


call.name_task(TASKS[0], _help_collapse)
call.name_task(TASKS[1], _help_expand)


@cfunc(types.int64(types.int64), cache=True)
def _handle_collapse(frame):
    if call.is_question(frame):
        return 0
    job = call.open_job(frame, -(-_sizes(frame)[0] // LANES), 0)
    call.ask_for_help(job, call.address_of(TASKS[0]))
    _work_collapse(job)
    call.wait(job)
    call.leave(job)
    return 0


@cfunc(types.int64(types.int64), cache=True)
def _handle_expand(frame):
    if call.is_question(frame):
        return 0
    job = call.open_job(frame, -(-_sizes(frame)[0] // LANES), 0)
    call.ask_for_help(job, call.address_of(TASKS[1]))
    _work_expand(job)
    call.wait(job)
    call.leave(job)
    return 0


call.register(TARGETS[0], _handle_collapse)
call.register(TARGETS[1], _handle_expand)
