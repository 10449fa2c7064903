"""Products of many rows: rows are laid out once for vectors, weights are read where they lie.

LANES rows of x, transposed, are a tile; the sums of two tiles with HEIGHT rows of a weight stay in a processor's
registers (`tile.py`) while both are read through, so a weight is never laid out, and codes are expanded HEIGHT rows at
a time for all tiles of a run. A row's sums are made one column after the other, whatever rows are beside it.
"""

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit, types

from pallas_kernels import cpu_call as call
from pallas_kernels.cpu_matmul.expand import expand
from pallas_kernels.cpu_matmul.frame import (
    block_rows,
    blocks,
    blocks_used,
    expert_of,
    floats,
    is_wide,
    source_of,
    weight,
    weights,
    width,
)
from pallas_kernels.cpu_matmul.tile import HEIGHT, LANES, lay_out, multiply_one, multiply_two

RUN_BYTES = 1 << 19  # of tiles that a unit multiplies: half of a core's second cache
UNIT_ROWS = 64  # of a weight that a thread claims at a time
TASK, TARGET = "dsv4_many_rows_task", "dsv4_many_rows"
FIRST, LAST, OF, RUN_WORDS = 0, 1, 2, 3  # words of a run: its tiles [FIRST, LAST), their expert


@njit
def _block_tiles(frame):
    """Tiles of a block; only the last may be partly filled."""
    return -(-block_rows(frame) // LANES)


@njit
def _tile_at(frame, tile):
    """The address of a tile [K, LANES]."""
    return call.data(call.result(frame, weights(frame))) + 4 * tile * width(frame) * LANES


@njit
def _lay_tile(frame, tile, sources):
    """Rows of x to a tile, as codes are expanded: of FP4 the even channels first. Lanes without a row repeat one."""
    K, R, each, at = width(frame), block_rows(frame), _block_tiles(frame), _tile_at(frame, tile)
    for r in range(LANES):
        sources[r] = source_of(frame, tile // each * R + min(tile % each * LANES + r, R - 1))
    packed = call.dtype(weight(frame, 0)) == call.U8
    column = 4 * LANES
    odd, step = (K // 2 * column, column) if packed else (column, 2 * column)
    whole = K - K % LANES
    for k in range(0, whole, LANES):
        even = at + k // 2 * step
        lay_out(sources.ctypes.data, 4 * k, even, even + odd, step)
    for r in range(LANES):
        row, lane = floats(sources[r], K), floats(at + 4 * r, (K - 1) * LANES + 1)
        for k in range(whole, K):
            lane[(k // 2 * step + k % 2 * odd) // 4] = row[k]


@njit
def _most_runs(frame):
    return blocks(frame) * _block_tiles(frame)


@njit
def _notes(job):
    """What a job carries: how many runs there are, and those."""
    return carray(call.as_pointer(call.notes(job)), (1 + RUN_WORDS * _most_runs(call.frame_of(job)),), np.int64)


@njit
def _find_runs(job):
    """Tiles of one expert that lie together, cut where they would not fit the cache -> how many runs."""
    frame, runs = call.frame_of(job), _notes(job)[1:]
    count, start, each = 0, 0, _block_tiles(frame)
    most = max(2, RUN_BYTES // (4 * width(frame) * LANES)) // 2 * 2  # tiles, in pairs
    while start < blocks_used(frame):
        expert, end = expert_of(frame, start), start + 1
        while end < blocks_used(frame) and expert_of(frame, end) == expert:
            end += 1
        for first in range(start * each, end * each, most):
            run = runs[RUN_WORDS * count :]
            run[FIRST], run[LAST], run[OF] = first, min(first + most, end * each), expert
            count += 1
        start = end
    return count


@njit
def _pieces(frame, i):
    """Units of weight i a run."""
    return -(-call.dim(weight(frame, i), 1) // UNIT_ROWS)


@njit
def _all_pieces(frame):
    total = 0
    for i in range(weights(frame)):
        total += _pieces(frame, i)
    return total


@njit
def _weight_rows(frame, i, expert, n, height, scratch):
    """The address of HEIGHT rows of a weight, from n on, as float32; of those past `height`, any."""
    w, K = weight(frame, i), width(frame)
    if is_wide(frame) and height == HEIGHT:
        return call.data(w) + 4 * (expert * call.dim(w, 1) + n) * K
    for m in range(height):
        expand(frame, i, expert, n + m, scratch[m * K : (m + 1) * K])
    return scratch.ctypes.data


@njit
def _store_part(spare, out, N, rows, height):
    """A part of one tile's products [LANES, HEIGHT] to where they belong."""
    target = floats(out, (rows - 1) * N + height)
    for r in range(rows):
        for m in range(height):
            target[r * N + m] = spare[r * HEIGHT + m]


@njit
def _multiply(frame, i, run, n, height, scratch, spare):
    """A run of tiles times `height` rows of weight i from n on."""
    K, N, R, each = width(frame), call.dim(weight(frame, i), 1), block_rows(frame), _block_tiles(frame)
    w = _weight_rows(frame, i, run[OF], n, height, scratch)
    tile, after = run[FIRST], 4 * K * LANES
    while tile < run[LAST]:
        place, x = tile % each * LANES, _tile_at(frame, tile)
        out = call.data(call.result(frame, i)) + 4 * ((tile // each * R + place) * N + n)
        whole = height == HEIGHT and place + LANES <= R
        if whole and tile + 1 < run[LAST] and (R % LANES == 0 or place + 2 * LANES <= R):
            multiply_two(w, 4 * K, x, after, K, out, 4 * N)
            tile += 2
            continue
        if whole:
            multiply_one(w, 4 * K, x, after, K, out, 4 * N)
        else:
            multiply_one(w, 4 * K, x, after, K, spare.ctypes.data, 4 * HEIGHT)
            _store_part(spare, out, N, min(LANES, R - place), height)
        tile += 1


@njit
def _unit(job, unit, scratch, spare):
    """One unit of the products."""
    frame = call.frame_of(job)
    count, runs = _notes(job)[0], _notes(job)[1:]
    i, left = 0, unit
    while left >= _pieces(frame, i) * count:
        left -= _pieces(frame, i) * count
        i += 1
    run, first = runs[left // _pieces(frame, i) * RUN_WORDS :], left % _pieces(frame, i) * UNIT_ROWS
    end = min(first + UNIT_ROWS, call.dim(weight(frame, i), 1))
    for n in range(first, end, HEIGHT):
        _multiply(frame, i, run, n, min(HEIGHT, end - n), scratch, spare)


@njit
def _work(job):
    """Take part in a job until nothing is left to claim: first tiles are laid out, then they are multiplied."""
    unit = call.claim(job)
    if unit < 0:
        return
    frame = call.frame_of(job)
    tiles = blocks_used(frame) * _block_tiles(frame)
    sources, spare = np.empty(LANES, np.int64), np.empty(LANES * HEIGHT, np.float32)
    scratch = np.zeros(HEIGHT * width(frame), np.float32)
    while unit >= 0:
        if unit < tiles:
            _lay_tile(frame, unit, sources)
        else:
            call.wait_for(job, tiles)  # which others have claimed
            _unit(job, unit - tiles, scratch, spare)
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
    job = call.open_job(frame, 0, 1 + RUN_WORDS * _most_runs(frame))
    count = _find_runs(job)
    _notes(job)[0] = count
    call.set_total(job, blocks_used(frame) * _block_tiles(frame) + count * _all_pieces(frame))
    call.ask_for_help(job, call.address_of(TASK))
    _work(job)
    call.wait(job)
    call.leave(job)
    return 0


call.register(TARGET, _handle)
