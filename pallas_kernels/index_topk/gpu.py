"""Index scores and their exact top-k on NVIDIA GPUs, by Mosaic GPU: Hopper (wgmma) and Blackwell (tcgen05).

One thread block takes up to four queries of a sequence and a share of its keys, 128 at a time. Four warpgroups: 0 and 1
score, 2 fetches keys (by TMA, or widening 4-bit rows), 3 selects: each of its warps keeps the list of one query, in
shared memory (`gpu_select.py`). A list takes what beats the least of its best so far, and is cut to these when it is
full, so it need not grow with the context. Scores never leave shared memory.

Where there are fewer blocks than multiprocessors, several share the keys of a query; their lists, `top_k` long each,
are merged by a second kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import Chip
from pallas_kernels.index_rows import Fp4Rows, dequantize_index_rows
from pallas_kernels.index_topk.gpu_device import (
    CODE_ROW,
    COMPUTE,
    DIM,
    HEADS,
    MERGING,
    SWIZZLE,
    Device,
    code_order,
    device_of,
)
from pallas_kernels.index_topk.gpu_select import LANES, STATE, TILE
from pallas_kernels.index_topk.reference import check_shapes
from pallas_kernels.index_topk.tuning import GPU_MAX_TOP_K, GpuConfig, gpu_config
from pallas_kernels.sparse_mla.gpu_rows import tiled
from pallas_kernels.sparse_mla.reference import Indices

FETCH, SELECT = COMPUTE, COMPUTE + 1  # warpgroups
MERGE_THREADS = MERGING * 128
COPIED_ROWS = 8  # bf16 keys are copied by groups of so many, and there must be whole ones
MERGE_ROUNDS = 64  # candidates of a thread that merges: they stay in registers


def index_topk_gpu(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array | Fp4Rows,
    visible: jax.Array,
    *,
    top_k: int,
    chip: Chip,
    interpret: Any = None,
) -> Indices:
    """The picks of `reference.pick_entries`; indices ascend instead of being ordered by score.

    Args:
      q: [B, T, H <= 64, D <= 128] bfloat16. weights: [B, T, H]. visible: int32 [B, T].
      keys: [B, N, D] bfloat16, or Fp4Rows; entries past `visible` may hold anything. Fewer than 128, and bfloat16 keys
        whose N is no multiple of 8, are padded on every call: pad them once instead.
      top_k: at most 1024.
      interpret: None, or Pallas's InterpretGPUParams for a run on CPU.
    Raises:
      ValueError: the shapes or types disagree or do not fit the kernel, or the chip has neither wgmma nor tcgen05.
    """
    lane = device_of(chip, "index_topk_gpu", interpret)
    _check(q, weights, keys, visible, top_k)
    (B, T, _, _), N = q.shape, keys.shape[1]
    top_k = min(top_k, N)
    q, weights, keys = _whole_heads(q, weights, keys)
    is_coded = isinstance(keys, Fp4Rows)
    config = gpu_config(B, T, N, top_k, chip, is_coded=is_coded)
    pad = -T % config.queries
    padded = lambda x: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) if pad else x
    visible = padded(jnp.clip(visible, 0, N).astype(jnp.int32))
    most = visible.reshape(B, -1, config.queries).max(-1)
    tiles = jnp.where(most <= top_k, 0, (most + TILE - 1) // TILE)  # none are scored where all are picked
    q = code_order(q) if is_coded else q
    operands = padded(q).reshape(B, -1, DIM), padded(weights.astype(jnp.float32)), _rows(keys)
    lists = _score(config, lane, top_k, is_coded, interpret)(visible, tiles, *operands)
    lists = [x.reshape(B * (T + pad), -1) for x in lists]
    while lists[0].shape[1] > top_k:
        lists = merge_lists(lists, lane, top_k, interpret)
    return Indices(lists[0].reshape(B, T + pad, top_k)[:, :T])


def _check(q, weights, keys, visible, top_k: int) -> None:
    check_shapes("index_topk_gpu", q, weights, keys, visible)
    H, D = q.shape[2:]
    if H > HEADS or D > DIM or not 1 <= top_k <= GPU_MAX_TOP_K:
        raise ValueError(
            f"index_topk_gpu: {H} heads of {D} channels and {top_k=}; it takes {HEADS} of {DIM} and {GPU_MAX_TOP_K} at "
            "most; use the xla op"
        )
    held = jnp.bfloat16 if isinstance(keys, Fp4Rows) else keys.dtype
    if q.dtype != jnp.bfloat16 or held != jnp.bfloat16:
        raise ValueError(f"index_topk_gpu: q is {q.dtype}, keys {held}; cast to bfloat16, or pass keys as Fp4Rows")


def _whole_heads(q, weights, keys):
    """64 heads of 128 channels and keys that can be copied, for models smaller than the published.

    Zeros change no score, and nobody sees keys past the last.
    """
    heads, channels = HEADS - q.shape[2], DIM - q.shape[3]
    keys = dequantize_index_rows(keys, q.dtype) if channels else keys
    rows = max(TILE - keys.shape[1], 0 if isinstance(keys, Fp4Rows) else -keys.shape[1] % COPIED_ROWS)
    if isinstance(keys, Fp4Rows):
        keys = Fp4Rows(jnp.pad(keys.data, ((0, 0), (0, rows), (0, 0))), keys.dim) if rows > 0 else keys
    elif rows > 0 or channels:
        keys = jnp.pad(keys, ((0, 0), (0, rows), (0, channels)))
    if heads or channels:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, heads), (0, channels)))
        weights = jnp.pad(weights, ((0, 0), (0, 0), (0, heads)))
    return q, weights, keys


def _rows(keys):
    return keys.data if isinstance(keys, Fp4Rows) else keys


@dataclass(frozen=True)
class _Share:
    """A block's sequence, first query and split, and its tiles of keys [low, high); all_picked: nothing is scored."""

    b: Any
    first: Any
    split: Any
    low: Any
    high: Any
    all_picked: Any


def _share(config: GpuConfig, tiles) -> _Share:
    work = jax.lax.axis_index("work")
    split, work = jax.lax.rem(work, config.splits), jax.lax.div(work, config.splits)
    groups = tiles.shape[1]
    b, group = jax.lax.div(work, groups), groups - 1 - jax.lax.rem(work, groups)  # those that see most come first
    total = tiles[b, group]
    each = jax.lax.div(total + (config.splits - 1), config.splits)
    low = jnp.minimum(each * split, total)
    return _Share(b, group * config.queries, split, low, jnp.minimum(low + each, total), total == 0)


def _kernel(visible, tiles, q, weights, keys, *refs, lane: Device, config: GpuConfig, is_coded: bool):
    share = _share(config, tiles)
    warpgroup = jax.lax.axis_index("warpgroup")
    out, refs = refs[: config.outputs], refs[config.outputs :]
    (q_tile, w_tile, q_ready, ring, full, empty, scores, scored, taken, *lists), extra = refs[:12], refs[12:]
    codes, extra = (extra[0], extra[1:]) if is_coded else (None, extra)
    top_k = out[0].shape[-1]
    queries = pl.ds(share.first, config.queries)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(lane.registers[0], action="decrease")

        @pl.when(warpgroup == 0)
        def _load():
            heads = pl.ds(share.first * HEADS, config.queries * HEADS)
            plgpu.copy_gmem_to_smem(q.at[share.b, heads], q_tile, q_ready)
            plgpu.copy_gmem_to_smem(weights.at[share.b, queries], w_tile, q_ready)

        plgpu.barrier_wait(q_ready)
        body = lambda lane, part: _score_tiles(
            share, part, q_tile, w_tile, ring, full, empty, scores, scored, taken, lane=lane, config=config
        )
        lane.compute(warpgroup, body, extra)

    @pl.when(warpgroup == FETCH)
    def _fetch():
        plgpu.set_max_registers(lane.registers[1], action="decrease")
        _fetch_tiles(share, keys.at[share.b], ring, full, empty, codes, lane=lane, config=config)

    @pl.when(warpgroup == SELECT)
    def _select():
        plgpu.set_max_registers(lane.registers[2], action="increase")
        lane.begin(lists[2], visible.at[share.b, queries])

        def step(i, _):
            slot = jax.lax.rem(i, config.scored)
            plgpu.barrier_wait(scored.at[slot])
            lane.append(scores.at[slot], lists, (share.low + i) * TILE, top_k)
            plgpu.barrier_arrive(taken.at[slot])
            return ()

        jax.lax.fori_loop(0, share.high - share.low, step, ())
        flags = share.all_picked.astype(jnp.int32), (share.split == 0).astype(jnp.int32)
        lane.finish(lists, [x.at[share.b, queries, share.split] for x in out], *flags, top_k)


def _score_tiles(share: _Share, part, q, weights, ring, full, empty, scores, scored, taken, *, lane, config: GpuConfig):
    def step(i, _):
        slot, place = jax.lax.rem(i, config.stages), jax.lax.rem(i, config.scored)
        plgpu.barrier_wait(full.at[slot])
        pl.when(i >= config.scored)(lambda: plgpu.barrier_wait(taken.at[place]))
        lane.score(part, ring.at[slot], q, weights, scores.at[place])
        plgpu.barrier_arrive(empty.at[slot])
        plgpu.barrier_arrive(scored.at[place])
        return ()

    jax.lax.fori_loop(0, share.high - share.low, step, ())
    _drain(share, taken, config.scored)


def _fetch_tiles(share: _Share, keys, ring, full, empty, codes, *, lane: Device, config: GpuConfig):
    ahead = config.code_stages - 1
    end = jnp.minimum(share.high * TILE, keys.shape[0])
    fetch = lambda i: lane.fetch_codes(
        keys, (share.low + i) * TILE, end, codes.at[jax.lax.rem(jnp.int32(i), config.code_stages)]
    )
    if codes is not None:
        for i in range(ahead):
            fetch(i)

    def step(i, _):
        slot = jax.lax.rem(i, config.stages)
        pl.when(i >= config.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        if codes is None:
            lane.load_wide(keys, (share.low + i) * TILE, ring.at[slot], full.at[slot])
            return ()
        lane.wait_for_codes(ahead - 1)
        fetch(i + ahead)
        lane.widen_codes(codes.at[jax.lax.rem(i, config.code_stages)], ring.at[slot])
        plgpu.commit_smem()  # the tensor core reads through another path than the threads wrote by
        plgpu.barrier_arrive(full.at[slot])
        return ()

    jax.lax.fori_loop(0, share.high - share.low, step, ())
    if codes is not None:
        lane.wait_for_codes(0)
    _drain(share, empty, config.stages)


def _drain(share: _Share, barrier, slots: int) -> None:
    """Wait for the last uses of the slots: no barrier may be left half way."""
    total = share.high - share.low

    def wait(i, _):
        plgpu.barrier_wait(barrier.at[jax.lax.rem(i, slots)])
        return ()

    jax.lax.fori_loop(jnp.maximum(total - slots, 0), total, wait, ())


def _score(config: GpuConfig, lane: Device, top_k: int, is_coded: bool, interpret: Any):
    """The function (visible [B, T], tiles, q [B, T * 64, 128], weights [B, T, 64], keys) -> lists of indices, int32
    [B, T, splits, top_k]; and of keys, if there are several to be merged."""
    Q, smem = config.queries, plgpu.SMEM

    def call(visible, tiles, q, weights, keys):
        B, T = visible.shape
        out = jax.ShapeDtypeStruct((B, T, config.splits, top_k), jnp.int32)
        kernel = plgpu.kernel(
            lambda *refs: _kernel(*refs, lane=lane, config=config, is_coded=is_coded),
            out_type=(out,) * config.outputs,
            scratch_types=[
                smem((Q * HEADS, DIM), jnp.bfloat16, transforms=tiled(SWIZZLE)),
                smem((Q, HEADS), jnp.float32),
                plgpu.Barrier(num_arrivals=2),
                smem((config.stages, TILE, DIM), jnp.bfloat16, transforms=tiled(SWIZZLE)),
                plgpu.Barrier(num_barriers=config.stages),
                plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=config.stages),
                smem((config.scored, Q, TILE), jnp.float32),
                plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=config.scored),
                plgpu.Barrier(num_barriers=config.scored),
                smem((Q, config.capacity), jnp.int32),
                smem((Q, config.capacity), jnp.int32),
                smem((Q, STATE), jnp.int32),
                *([smem((config.code_stages, TILE * CODE_ROW), jnp.uint8)] if is_coded else []),
                *lane.scratch(),
            ],
            grid=(tiles.size * config.splits,),
            grid_names=("work",),
            num_threads=SELECT + 1,
            thread_name="warpgroup",
            kernel_name="index_topk",
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=interpret,
        )
        return kernel(visible, tiles, q, weights, keys)

    return call


def merge_lists(lists: list[jax.Array], lane: Device, top_k: int, interpret: Any) -> list[jax.Array]:
    """Indices and keys int32 [R, lists * top_k] -> the same of fewer lists."""
    R, size = lists[0].shape
    together = min(size // top_k, max(2, MERGE_THREADS * MERGE_ROUNDS // top_k))
    groups = -(-size // (together * top_k))
    rounds = -(-together * top_k // MERGE_THREADS)
    out = jax.ShapeDtypeStruct((R, groups, top_k), jnp.int32)

    def index_topk_merge(index, keys, out_index, out_keys, exchange):
        work = jax.lax.axis_index("work")
        r, group = jax.lax.div(work, groups), jax.lax.rem(work, groups)
        first = group * (together * top_k)
        length = jnp.minimum(size - first, together * top_k)
        held, out = ([x.at[r, group] for x in pair] for pair in ((keys, index), (out_keys, out_index)))
        lane.merge(held, length, exchange, out, rounds, top_k)

    lists = [_in_groups(x, groups, together * top_k) for x in lists]
    kernel = plgpu.kernel(
        index_topk_merge,
        out_type=(out, out),
        scratch_types=[plgpu.SMEM((LANES,), jnp.int32)],
        grid=(R * groups,),
        grid_names=("work",),
        num_threads=MERGING,
        thread_name="warpgroup",
        kernel_name="index_topk_merge",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return [x.reshape(R, -1) for x in kernel(*lists)]


def _in_groups(x, groups: int, width: int):
    """[R, n] -> [R, groups, width]; what is added at the end is never read."""
    return jnp.pad(x, ((0, 0), (0, groups * width - x.shape[1]))).reshape(x.shape[0], groups, width)
