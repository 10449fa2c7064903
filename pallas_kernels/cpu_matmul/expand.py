"""A weight's row as float32, from whatever it is stored in."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from pallas_kernels import cpu_call as call
from pallas_kernels.cpu_matmul.frame import WEIGHTS, floats, weight, weights

HALF = 16  # bytes of a packed row that share a scale


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
def _expand_codes(w, s, block_shape, expert, row, out):
    """Of FP8 or FP4."""
    N, width, s_dtype = call.dim(w, 1), call.dim(w, 2), call.dtype(s)
    block = carray(call.as_pointer(call.data(block_shape)), (2,), np.int32)
    codes = call.data(w) + (expert * N + row) * width
    scale = (expert * call.dim(s, 1) + row // block[0]) * call.dim(s, 2) * (4 if s_dtype == call.F32 else 1)
    if call.dtype(w) == call.U8:
        _expand_fp4(codes, call.data(s) + scale, s_dtype, out)
    else:
        _expand_fp8(codes, call.data(s) + scale, s_dtype, block[1], out)


@njit
def expand(frame, i, expert, row, out):
    """Row `row` of weight i of one expert; see `frame.py` for what a call has."""
    w = weight(frame, i)
    if call.dtype(w) == call.F32:
        N, K = call.dim(w, 1), call.dim(w, 2)
        out[:] = floats(call.data(w) + 4 * (expert * N + row) * K, K)
    elif call.dtype(w) == call.BF16:
        _expand_bf16(call.data(w) + 2 * (expert * call.dim(w, 1) + row) * call.dim(w, 2), out)
    else:
        block_shape = call.argument(frame, call.arguments(frame) - 1)
        _expand_codes(w, call.argument(frame, WEIGHTS + weights(frame) + i), block_shape, expert, row, out)
