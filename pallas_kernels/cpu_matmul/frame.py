"""What a call of these kernels has: the places of its buffers, as XLA hands them over."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from pallas_kernels import cpu_call as call

X, ROW, EXPERT, USED, WEIGHTS = range(5)  # arguments: from the last on a weight each, then, of codes, a scale each and
SCALES_END = 1  # the shape of a scale's block; results: the products with each weight, and what a kernel needs besides


@njit
def floats(address, count):
    return carray(call.as_pointer(address), (count,), np.float32)


@njit
def ints(buffer, count):
    return carray(call.as_pointer(call.data(buffer)), (count,), np.int32)


@njit
def weight(frame, i):
    return call.argument(frame, WEIGHTS + i)


@njit
def is_wide(frame):
    """Whether weights are float32, to be read as they lie."""
    return call.dtype(weight(frame, 0)) == call.F32


@njit
def weights(frame):
    """How many there are."""
    dtype, count = call.dtype(weight(frame, 0)), call.arguments(frame) - WEIGHTS
    return count if dtype == call.F32 or dtype == call.BF16 else (count - SCALES_END) // 2


@njit
def width(frame):
    """K."""
    return call.dim(call.argument(frame, X), 1)


@njit
def blocks(frame):
    return call.dim(call.argument(frame, EXPERT), 0)


@njit
def block_rows(frame):
    """R."""
    return call.dim(call.argument(frame, ROW), 0) // blocks(frame)


@njit
def blocks_used(frame):
    return ints(call.argument(frame, USED), 1)[0]


@njit
def expert_of(frame, block):
    return np.int64(ints(call.argument(frame, EXPERT), blocks(frame))[block])


@njit
def source_of(frame, row):
    """The address of the row of x that sits in a row of the blocks; the last one for those there are not."""
    x, places = call.argument(frame, X), ints(call.argument(frame, ROW), blocks(frame) * block_rows(frame))
    return call.data(x) + 4 * min(np.int64(places[row]), call.dim(x, 0) - 1) * call.dim(x, 1)
