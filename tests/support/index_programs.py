"""Kernels around the inline code of index top-k, for `pallas_kernels.aot` to compile and `ptx_program` to run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import Chip
from pallas_kernels.index_topk.gpu import merge_lists
from pallas_kernels.index_topk.gpu_device import CODE_ROW, DIM, SWIZZLE, Device
from pallas_kernels.index_topk.gpu_select import STATE, TILE
from pallas_kernels.sparse_mla.gpu_rows import tiled

CODES_BYTES = -(-TILE * CODE_ROW // 1024) * 1024  # shared memory before the tile that `codes` fills


def array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def one_warpgroup(name: str, body, out_type, scratch: list):
    """The kernel of one block of one warpgroup."""
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    return plgpu.kernel(
        body, out_type=out_type, scratch_types=scratch, grid=(1,), grid_names=("work",), num_threads=1,
        thread_name="warpgroup", kernel_name=name, compiler_params=params,
    )  # fmt: skip


def stream(chip: Chip, queries: int, tiles: int, capacity: int, top_k: int, splits: int):
    """(scores [tiles, queries, 128], visible [queries]) -> lists [queries, splits, top_k], those of split 1 written."""
    lane = Device()

    def body(scores, visible, out_index, out_keys, *lists):
        lane.begin(lists[2], visible)

        def step(i, _):
            lane.append(scores.at[i], lists, i * TILE, top_k)
            return ()

        jax.lax.fori_loop(0, tiles, step, ())
        out = [x.at[:, 1] for x in (out_index, out_keys)]
        lane.finish(lists, out, jnp.int32(0), jnp.int32(1), top_k)

    memory = lambda words: plgpu.SMEM((queries, words), jnp.int32)
    run = one_warpgroup(
        "stream",
        body,
        (array(jnp.int32, queries, splits, top_k),) * 2,
        [memory(capacity), memory(capacity), memory(STATE)],
    )
    return run, [array(jnp.float32, tiles, queries, TILE), array(jnp.int32, queries)]


def codes(chip: Chip, rows: int, start: int):
    """uint8 [rows, 68] -> the keys of a tile from row `start` on."""
    lane = Device()

    def body(keys, out, slot, tile):
        lane.fetch_codes(keys, jnp.int32(start), jnp.int32(rows), slot)
        lane.wait_for_codes(0)
        lane.widen_codes(slot, tile)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out)
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        plgpu.SMEM((TILE * CODE_ROW,), jnp.uint8),
        plgpu.SMEM((TILE, DIM), jnp.bfloat16, transforms=tiled(SWIZZLE)),
    ]
    return one_warpgroup("codes", body, array(jnp.bfloat16, TILE, DIM), scratch), [array(jnp.uint8, rows, CODE_ROW)]


def merge(chip: Chip, rows: int, lists: int, top_k: int):
    """Lists of indices and of their keys, int32 [rows, lists * top_k]."""
    held = array(jnp.int32, rows, lists * top_k)
    return lambda index, keys: merge_lists([index, keys], Device(), top_k, None), [held, held]
