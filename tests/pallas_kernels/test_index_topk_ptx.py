"""The PTX that the selection and the widening of index keys are compiled to, run on arrays.

A kernel's parameters come in the order in which its code first names them.
"""

from __future__ import annotations

import index_programs
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_program import Block

from pallas_kernels import aot
from pallas_kernels.formats import decode_e2m1, decode_e8m0, unpack_fp4
from pallas_kernels.index_topk.gpu_device import CODE_ROW, DIM, code_order
from pallas_kernels.index_topk.gpu_select import HIDDEN, TILE
from pallas_kernels.sparse_mla.gpu_rows import piece_offset

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not aot.available("cuda"), reason="needs the CUDA compiler: pip install 'dsv4-jax[aot]'"),
]

SHARED = 64 << 10


@pytest.fixture(params=["H100", "B200"])
def compiled(request, tmp_path):
    """(program of index_programs, its sizes) -> PTX."""

    def run(name: str, **sizes: int) -> str:
        case = aot.Case(f"{index_programs.__file__}:{name}", sizes)
        [report] = aot.run_cases([case], request.param, keep=str(tmp_path))
        assert "error" not in report, report
        [kernel] = report["kernels"]
        return (tmp_path / "mosaic" / f"{kernel}.ptx").read_text()

    return run


def words(*arrays) -> list[np.ndarray]:
    """The memory of each."""
    return [x.reshape(-1).view(np.uint8) for x in arrays]


def best(scores, top_k: int) -> np.ndarray:
    """The places of the `top_k` best, the lower of a tie, ascending; then -1."""
    places = np.sort(np.argsort(-scores.astype(np.float64), kind="stable")[:top_k])
    return np.pad(places, (0, top_k - places.size), constant_values=-1)


def test_warps_keep_the_best_of_their_streams(compiled):
    """Three queries, each with its own warp and its own place in the result; a list fills up several times."""
    queries, tiles, top_k, splits = 3, 9, 100, 2
    program = compiled("stream", queries=queries, tiles=tiles, capacity=256, top_k=top_k, splits=splits)
    rng, entries = np.random.default_rng(0), tiles * TILE
    streams = rng.standard_normal((queries, entries)), rng.integers(-2, 3, (queries, entries)), np.arange(entries) - 300
    for scores in streams:
        scores = np.broadcast_to(scores, (queries, entries)).astype(np.float32)
        visible = np.array([entries, entries - 70, 40], np.int32)
        index, keys = np.full((2, queries, splits, top_k), 77, np.int32)
        by_tile = np.ascontiguousarray(scores.reshape(queries, tiles, TILE).swapaxes(0, 1))
        Block(program, 128, words(by_tile, index, keys, visible), SHARED).run()
        for n in range(queries):
            np.testing.assert_array_equal(index[n, 1], best(scores[n, : visible[n]], top_k))
        assert (index[:, 0] == 77).all() and (keys[:, 0] == 77).all()


@pytest.mark.parametrize("order", [1, -1])
def test_a_block_merges_lists(compiled, order):
    rows, lists, top_k = 2, 7, 512
    program = compiled("merge", rows=rows, lists=lists, top_k=top_k)
    rng, size = np.random.default_rng(1), lists * top_k
    keys, index = rng.integers(-50, 50, (rows, size)).astype(np.int32), np.arange(rows * size, dtype=np.int32) * 3
    index = index.reshape(rows, size)
    empty = np.arange(size) % top_k >= np.repeat(rng.integers(50, top_k, lists), top_k)
    keys[:, empty], index[:, empty] = HIDDEN, -1
    for row in range(rows):
        out_keys, out_index = np.zeros((2, rows, 1, top_k), np.int32)
        Block(program, 512, words(keys, index, out_keys, out_index), SHARED, block=row).run(order)
        want = best(keys[row], top_k)
        np.testing.assert_array_equal(out_index[row, 0], index[row][want])
        np.testing.assert_array_equal(out_keys[row, 0], keys[row][want])


@pytest.mark.parametrize(("rows", "start"), [(402, 384), (400, 256), (400, 384)])
def test_codes_become_keys(compiled, rows, start):
    """Copied in pieces of 4 and of 16 bytes, over the end and not; rows that there are not are zeros."""
    program, rng = compiled("codes", rows=rows, start=start), np.random.default_rng(2)
    held = rng.integers(0, 256, (rows, CODE_ROW), dtype=np.uint8)
    held[:, DIM // 2 :] = rng.integers(100, 140, (rows, DIM // 32))
    block = Block(program, 128, words(held, held), SHARED).run()
    tile = np.zeros((TILE, CODE_ROW), np.uint8)
    tile[: rows - start] = held[start : start + TILE]
    values = np.asarray(decode_e2m1(unpack_fp4(jnp.asarray(tile[:, : DIM // 2]))))
    values = values * np.repeat(np.asarray(decode_e8m0(jnp.asarray(tile[:, DIM // 2 :]))), 32, 1)
    row, piece = np.meshgrid(np.arange(TILE), np.arange(DIM // 8), indexing="ij")
    places = index_programs.CODES_BYTES // 2 + piece_offset(row, piece, DIM // 8)[..., None] // 2 + np.arange(8)
    got = block.shared.view(jnp.bfloat16.dtype)[places].reshape(TILE, DIM)
    np.testing.assert_array_equal(got.astype(np.float32), values[:, np.asarray(code_order(jnp.arange(DIM)))])
