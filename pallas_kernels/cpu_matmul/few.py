"""Products of few rows: every weight is read once, where it lies, by all of XLA's threads.

A row of a weight at a time is expanded to float32, if it is not that, and multiplied with every row that wants it while
it is in the first cache: one stream of memory a thread, which the processor fetches ahead (25 GB/s where four rows at a
time came to 14). A row's sums are made by the same code whatever rows are beside it.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc, njit, types

from pallas_kernels import cpu_call as call
from pallas_kernels.cpu_matmul.expand import expand
from pallas_kernels.cpu_matmul.frame import (
    block_rows,
    blocks_used,
    expert_of,
    floats,
    is_wide,
    source_of,
    weight,
    weights,
    width,
)

UNIT_BYTES = 1 << 17  # of a weight, about, that a thread claims at a time
TASK, TARGET = "dsv4_few_rows_task", "dsv4_few_rows"
FAST = {"reassoc", "contract", "nsz"}


@njit
def _unit_rows(frame, i):
    """Rows of a weight in a unit."""
    w = weight(frame, i)
    dtype = call.dtype(w)
    return max(1, UNIT_BYTES // (call.dim(w, 2) * (4 if dtype == call.F32 else 2 if dtype == call.BF16 else 1)))


@njit
def _units_of(frame, i):
    """Units a block of weight i."""
    return -(-call.dim(weight(frame, i), 1) // _unit_rows(frame, i))


@njit
def _units(frame):
    total = 0
    for i in range(weights(frame)):
        total += _units_of(frame, i)
    return total * blocks_used(frame)


@njit(fastmath=FAST)
def _dot(w, x):
    a = np.float32(0)
    for k in range(len(x)):
        a += w[k] * x[k]
    return a


@njit
def _multiply(frame, i, block, first, last, scratch):
    """Rows [first, last) of weight i, of the expert of a block, times the rows of that block."""
    w, y, wide = weight(frame, i), call.result(frame, i), is_wide(frame)
    rows, K, N, expert = block_rows(frame), width(frame), call.dim(w, 1), expert_of(frame, block)
    ys = floats(call.data(y) + 4 * block * rows * N, rows * N)
    held = floats(call.data(w), (expert + 1) * N * K if wide else 0)
    for n in range(first, last):
        at = (expert * N + n) * K
        if not wide:
            expand(frame, i, expert, n, scratch)
        row = held[at : at + K] if wide else scratch
        for r in range(rows):
            ys[r * N + n] = _dot(row, floats(source_of(frame, block * rows + r), K))


@njit
def _work(job):
    """Take part in a job until nothing is left to claim."""
    unit = call.claim(job)
    if unit < 0:
        return
    frame = call.frame_of(job)
    scratch, blocks = np.empty(width(frame), np.float32), blocks_used(frame)
    while unit >= 0:
        i, left = 0, unit
        while left >= _units_of(frame, i) * blocks:
            left -= _units_of(frame, i) * blocks
            i += 1
        rows, each = _unit_rows(frame, i), _units_of(frame, i)
        first = left % each * rows
        _multiply(frame, i, left // each, first, min(first + rows, call.dim(weight(frame, i), 1)), scratch)
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
    job = call.open_job(frame, _units(frame), 0)
    call.ask_for_help(job, call.address_of(TASK))
    _work(job)
    call.wait(job)
    call.leave(job)
    return 0


call.register(TARGET, _handle)
