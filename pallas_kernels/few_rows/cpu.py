"""Products of few rows on a CPU: every weight is read once, where it lies, by all of XLA's threads.

A row of a weight at a time is expanded to float32, if it is not that, and multiplied with every row that wants it while
it is in the first cache: one stream of memory a thread, which the processor fetches ahead (25 GB/s where four rows at a
time came to 14). A row's sums are made by the same code whatever rows are beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numba import carray, cfunc, njit, types

from pallas_kernels import cpu_call as call
from pallas_kernels.few_rows.reference import FewWeights

UNIT_BYTES = 1 << 17  # of a weight, about, that a thread claims at a time
HALF = 16  # bytes of a packed row that share a scale
X, EXPERT, USED, WEIGHTS = 0, 1, 2, 3  # arguments; from the last on a weight each, then a scale each, if there are
TASK, TARGET = "dsv4_few_rows_task", "dsv4_few_rows"
KINDS = (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.uint8)  # of a weight
FAST = {"reassoc", "contract", "nsz"}


@njit
def _unit_rows(width, dtype):
    """Rows of a weight in a unit."""
    row = width * (4 if dtype == call.F32 else 2 if dtype == call.BF16 else 1)
    return max(1, UNIT_BYTES // row)


@njit
def _units_of(frame, i):
    """Units a block of weight i."""
    w = call.argument(frame, WEIGHTS + i)
    return -(-call.dim(w, 1) // _unit_rows(call.dim(w, 2), call.dtype(w)))


@njit
def _blocks_used(frame):
    return carray(call.as_pointer(call.data(call.argument(frame, USED))), (1,), np.int32)[0]


@njit
def _units(frame):
    total = 0
    for i in range(call.results(frame)):
        total += _units_of(frame, i)
    return total * _blocks_used(frame)


@njit(fastmath=FAST)
def _dot(w, x):
    a = np.float32(0)
    for k in range(len(x)):
        a += w[k] * x[k]
    return a


@njit
def _e8m0(byte):
    """As `formats.decode_e8m0`."""
    if byte == 255:
        return np.float32(np.nan)
    return call.as_float(np.int32(0x400000) if byte == 0 else np.int32(byte) << 23)


@njit
def _e4m3(code):
    """As `formats.decode_e4m3`, by placing bits; codes below 8 are subnormal."""
    code = np.int32(code)
    low = code & 0x7F
    normal = call.as_float((low << 20) + (120 << 23))
    value = call.as_float((low << 20) + (121 << 23)) - np.float32(2**-6) if low < 8 else normal
    value = np.float32(np.nan) if low == 0x7F else value
    return -value if code > 0x7F else value


@njit
def _e2m1(code):
    """As `formats.decode_e2m1`, by placing bits; codes below 2 are 0 and 0.5."""
    code = np.int32(code)
    low = code & 7
    value = np.float32(0.5) * np.float32(low) if low < 2 else call.as_float((low << 22) + (126 << 23))
    return -value if code > 7 else value


@njit
def _scale(scale, dtype, i):
    if dtype == call.F32:
        return carray(call.as_pointer(scale + 4 * i), (1,), np.float32)[0]
    return _e8m0(carray(call.as_pointer(scale + i), (1,), np.uint8)[0])


@njit
def _expand_bf16(data, out):
    codes = carray(call.as_pointer(data), (len(out),), np.uint16)
    for k in range(len(out)):
        out[k] = call.as_float(np.int32(codes[k]) << 16)


@njit
def _expand_fp8(data, scale, scale_dtype, columns, out):
    """A row of codes times a scale per `columns` of them."""
    codes = carray(call.as_pointer(data), (len(out),), np.uint8)
    for group in range(-(-len(out) // columns)):
        s, at = _scale(scale, scale_dtype, group), slice(group * columns, (group + 1) * columns)
        source, target = codes[at], out[at]
        for k in range(len(target)):
            target[k] = _e4m3(source[k]) * s


@njit
def _expand_fp4(data, scale, scale_dtype, out):
    """A row of bytes: even channels to the first half of `out`, odd ones to the second."""
    width = len(out) // 2
    codes = carray(call.as_pointer(data), (width,), np.uint8)
    for group in range(width // HALF):
        s, at = _scale(scale, scale_dtype, group), slice(group * HALF, (group + 1) * HALF)
        source, even, odd = codes[at], out[:width][at], out[width:][at]
        for k in range(HALF):
            even[k] = _e2m1(source[k] & 15) * s
            odd[k] = _e2m1(source[k] >> 4) * s


@njit
def _expand(frame, i, expert, row, out):
    """Row `row` of a weight of one expert, as float32."""
    w = call.argument(frame, WEIGHTS + i)
    N, width, dtype = call.dim(w, 1), call.dim(w, 2), call.dtype(w)
    at = (expert * N + row) * width
    if dtype == call.BF16:
        _expand_bf16(call.data(w) + 2 * at, out)
        return
    s = call.argument(frame, WEIGHTS + call.results(frame) + i)
    shape = call.argument(frame, call.arguments(frame) - 1)
    block = carray(call.as_pointer(call.data(shape)), (2,), np.int32)
    size = 4 if call.dtype(s) == call.F32 else 1
    first = call.data(s) + size * (expert * call.dim(s, 1) + row // block[0]) * call.dim(s, 2)
    if dtype == call.U8:
        _expand_fp4(call.data(w) + at, first, call.dtype(s), out)
    else:
        _expand_fp8(call.data(w) + at, first, call.dtype(s), block[1], out)


@njit
def _multiply(frame, i, block, first, last, scratch):
    """Rows [first, last) of weight i, of the expert of a block, times the rows of that block."""
    x, w, y = call.argument(frame, X), call.argument(frame, WEIGHTS + i), call.result(frame, i)
    experts = call.argument(frame, EXPERT)
    rows, K, N = call.dim(x, 0) // call.dim(experts, 0), call.dim(x, 1), call.dim(w, 1)
    expert = np.int64(carray(call.as_pointer(call.data(experts)), (call.dim(experts, 0),), np.int32)[block])
    xs = carray(call.as_pointer(call.data(x)), (call.dim(x, 0) * K,), np.float32)
    ys = carray(call.as_pointer(call.data(y)), (call.dim(x, 0) * N,), np.float32)
    is_wide = call.dtype(w) == call.F32
    held = carray(call.as_pointer(call.data(w)), ((expert + 1) * N * K if is_wide else 0,), np.float32)
    for n in range(first, last):
        at = (expert * N + n) * K
        if not is_wide:
            _expand(frame, i, expert, n, scratch)
        row = held[at : at + K] if is_wide else scratch
        for r in range(block * rows, block * rows + rows):
            ys[r * N + n] = _dot(row, xs[r * K : (r + 1) * K])


@njit
def _work(job):
    """Take part in a job until nothing is left to claim."""
    unit = call.claim(job)
    if unit < 0:
        return
    frame = call.frame_of(job)
    scratch = np.empty(call.dim(call.argument(frame, X), 1), np.float32)
    blocks = _blocks_used(frame)
    while unit >= 0:
        i, left = 0, unit
        while left >= _units_of(frame, i) * blocks:
            left -= _units_of(frame, i) * blocks
            i += 1
        w = call.argument(frame, WEIGHTS + i)
        rows, each = _unit_rows(call.dim(w, 2), call.dtype(w)), _units_of(frame, i)
        first = left % each * rows
        _multiply(frame, i, left // each, first, min(first + rows, call.dim(w, 1)), scratch)
        call.finish(job)
        unit = call.claim(job)


@cfunc(types.void(types.int64), cache=True)
def _help(job):
    _work(job)
    call.leave(job)


call.name_task(TASK, _help)


@cfunc(types.int64(types.int64), cache=True)
def _handle(frame):
    if call.is_question(frame):
        return 0
    job = call.open_job(frame, _units(frame))
    call.ask_for_help(job, call.address_of(TASK))
    _work(job)
    call.wait(job)
    call.leave(job)
    return 0


call.register(TARGET, _handle)


def few_rows_cpu(x: jax.Array, expert: jax.Array, used: jax.Array, weights: Sequence[FewWeights]):
    """See `few_rows`. Raises ValueError for weights of kinds that it does not know or that differ in kind."""
    first = weights[0]
    for w in weights:
        kind = (w.data.dtype, w.scale is None, w.block, w.data.shape[0], w.data.shape[2])
        if kind != (first.data.dtype, first.scale is None, first.block, first.data.shape[0], first.data.shape[2]):
            raise ValueError(f"few_rows: weights differ in kind: {first.data.dtype}{list(first.data.shape)}, {kind}")
    packed = first.data.dtype == jnp.uint8
    if first.data.dtype not in KINDS or (first.scale is None) == (first.data.dtype.itemsize == 1):
        raise ValueError(
            f"few_rows: {first.data.dtype} weights, scale {first.scale}: not float32, bfloat16, FP8 or FP4"
        )
    if x.dtype != jnp.float32 or x.shape[1] != first.data.shape[2] * (1 + packed) or x.shape[0] % len(expert):
        raise ValueError(f"few_rows: x {x.dtype}{list(x.shape)} does not fit w {list(first.data.shape)}")
    if packed and (first.block != (1, 2 * HALF) or x.shape[1] % (2 * HALF)):
        raise ValueError(
            f"few_rows: FP4 has a scale per row and {2 * HALF} channels, not {first.block} of {x.shape[1]}"
        )
    if packed:  # as the codes of a byte are expanded
        x = jnp.concatenate([x[:, 0::2], x[:, 1::2]], axis=1)
    scales: list[jax.Array] = []
    if first.scale is not None:
        scales = [w.scale for w in weights if w.scale is not None] + [jnp.asarray(first.block, jnp.int32)]
    out = tuple(jax.ShapeDtypeStruct((x.shape[0], w.data.shape[1]), jnp.float32) for w in weights)
    run = jax.ffi.ffi_call(TARGET, out, vmap_method="sequential")
    return run(x, expert, jnp.reshape(used, (1,)), *(w.data for w in weights), *scales)
