"""Sparse MLA on NVIDIA GPUs, by Mosaic GPU: Hopper (sm_90a, wgmma) and Blackwell (sm_100a, tcgen05).

One thread block attends one query's tile of 64 heads (the M of every product) to 64 rows at a time. Four warpgroups:
0 and 1 compute, each the output of half the channels (64 x 256 fp32); how they multiply, and where sums are held, is
`gpu_device.py`'s. 2 and 3 gather, each into a row tile of its own: one fills while the other is attended to. K = V, so
a gathered tile serves both products. The rows of a query are a list, its window rows before its picked entries; at
decode several blocks share the list and their outputs are combined by log-sum-exp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import Chip
from pallas_kernels.kv_rows import Fp8Rows
from pallas_kernels.sparse_mla.gpu_device import COMPUTE, HEADS, Device, device_of, scale_lines
from pallas_kernels.sparse_mla.gpu_rows import ROWS, tiled
from pallas_kernels.sparse_mla.reference import FirstN, Indices, Picks, Window, as_mask, check_shapes

GATHER = 2  # warpgroups that fetch rows
MAX_SPLITS = 16
LOG2E = math.log2(math.e)
SHARED = 7  # references of scratch that every device has
EMPTY = -1e30  # the running maximum before any row: finite, so that no difference of infinities arises


@dataclass(frozen=True)
class Plan:
    """What is fixed when the kernel is compiled."""

    window_tiles: int
    by_count: bool  # entries are the first `count` of them, not listed
    splits: int  # blocks that share one query's rows
    head_tiles: int
    width: int  # channels
    scale: float


def _block(plan: Plan, tokens: int, tile_count):
    """This block's query, its tile of heads, its share of the tiles."""
    work = jax.lax.axis_index("work")
    head, work = jax.lax.rem(work, plan.head_tiles) * HEADS, jax.lax.div(work, plan.head_tiles)
    split, work = jax.lax.rem(work, plan.splits), jax.lax.div(work, plan.splits)
    b, t = jax.lax.div(work, tokens), jax.lax.rem(work, tokens)
    tiles = tile_count[b, t]
    share = jax.lax.div(tiles + (plan.splits - 1), plan.splits)
    low = jnp.minimum(share * split, tiles)
    return b, t, head, split, low, jnp.minimum(low + share, tiles)


def _kernel(tile_count, count, index, sinks, q, window, entries, out, lse, *scratch, lane: Device, plan: Plan):
    block = _block(plan, q.shape[1], tile_count)
    warpgroup = jax.lax.axis_index("warpgroup")
    scratch, extra = scratch[:SHARED], scratch[SHARED:]

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        plgpu.set_max_registers(lane.registers[0], action="increase")
        attend = lambda lane, half: _attend(block, half, sinks, q, out, lse, *scratch, lane=lane, plan=plan)
        lane.attend(warpgroup, attend, extra)

    @pl.when(warpgroup >= COMPUTE)
    def _gather():
        plgpu.set_max_registers(lane.registers[1], action="decrease")
        _fetch(block, warpgroup - COMPUTE, count, index, window, entries, *scratch, lane=lane, plan=plan)


def _fetch(
    block, slot, count, index, window, entries, q_tile, row_tiles, numbers, q_ready, full, empty, done, *, lane, plan
):
    """Fill row tile `slot` with every second tile of the list."""
    b, t, _, _, low, high = block
    tile = row_tiles.at[slot]

    def copy(rows, j, by_count=False):
        listed = ((j - plan.window_tiles) * ROWS, count[b, t]) if by_count else index.at[b, t, pl.ds(j * ROWS, ROWS)]
        lane.copy_rows(tuple(part.at[b] for part in rows), listed, tile, numbers.at[slot])

    def step(i, _):
        j = low + slot + i * GATHER

        @pl.when(i > 0)
        def _reuse():
            plgpu.barrier_wait(empty.at[slot])

        pl.when(j < plan.window_tiles)(lambda: copy(window, j))
        if entries:
            pl.when(j >= plan.window_tiles)(lambda: copy(entries, j, plan.by_count))
        plgpu.commit_smem()  # wgmma reads through another path than the copies wrote by
        plgpu.barrier_arrive(full.at[slot])
        return ()

    tiles = jax.lax.div(jnp.maximum(high - low - slot + (GATHER - 1), 0), GATHER)
    jax.lax.fori_loop(0, tiles, step, ())

    @pl.when(tiles > 0)
    def _last_use():  # a barrier's every phase is to be seen
        plgpu.barrier_wait(empty.at[slot])


def _attend(block, half, sinks, q, out, lse, q_tile, row_tiles, numbers, q_ready, full, empty, done, *, lane, plan):
    """Attend to all tiles of the share; the output of channels half * width / 2 .. is this warpgroup's."""
    b, t, head, split, low, high = block
    heads, first = pl.ds(head, HEADS), half * (plan.width // 2)
    channels = [pl.ds(first + c, lane.part) for c in range(0, plan.width // 2, lane.part)]

    @pl.when(half == 0)
    def _load():
        plgpu.copy_gmem_to_smem(q.at[b, t, heads], q_tile.at[0], q_ready)

    plgpu.barrier_wait(q_ready)

    def step(j, carry):
        slot = jax.lax.rem(j - low, GATHER)
        plgpu.barrier_wait(full.at[slot])
        # Always 0, but unknown to be: else the compiler keeps a descriptor of every piece of q, and spills.
        zero = jax.lax.shift_right_logical(j, 30)
        tile = row_tiles.at[slot], numbers.at[slot]
        carry = _attend_tile(lane, q_tile.at[zero], *tile, channels, carry, plan.scale * LOG2E)
        plgpu.barrier_arrive(empty.at[slot])
        return carry

    start = lane.zeros(len(channels)), lane.full((HEADS,), EMPTY), lane.full((HEADS,), 0.0)
    acc, peak, total = jax.lax.fori_loop(low, high, step, start)
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)  # both are through with q, whose place the output takes
    shrink = lane.full((HEADS,), 1.0)
    if plan.splits == 1:
        sink = lane.load_lines(sinks.at[heads]) * LOG2E
        top = jnp.maximum(peak, sink)
        shrink = jnp.exp2(peak - top)
        total = total * shrink + jnp.exp2(sink - top)
        peak = top
    safe = jnp.where(total == 0, 1.0, total)
    for part, here in zip(lane.sums(acc), channels, strict=True):
        part = scale_lines(part, shrink / safe)
        if plan.splits > 1:
            out[b, t, split, heads, here] = part
            continue
        q_tile[0, :, here] = part.astype(jnp.bfloat16)
    if plan.splits == 1:
        plgpu.commit_smem()
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

        @pl.when(half == 0)
        def _store():
            plgpu.copy_smem_to_gmem(q_tile.at[0], out.at[b, t, split, heads])
            plgpu.wait_smem_to_gmem(0)

    @pl.when(half == 0)
    def _lse():
        lse[b, t, split, heads] = jnp.where(total == 0, -jnp.inf, peak / LOG2E + jnp.log(safe))


def _attend_tile(lane, q_tile, tile, numbers, channels, carry, scale):
    """One step of the running softmax, in base 2."""
    acc, peak, total = carry
    logits = lane.scores(q_tile, tile) * scale
    seen = jax.lax.broadcast_in_dim(lane.load_columns(numbers) >= 0, logits.shape, [1])
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jnp.maximum(peak, logits.max(axis=1))
    rescale = jnp.exp2(peak - top)
    weights = jnp.exp2(logits - jax.lax.broadcast_in_dim(top, logits.shape, [0]))
    total = total * rescale + weights.sum(axis=1)
    weights = weights.astype(jnp.bfloat16)
    acc = lane.accumulate(acc, rescale, weights, [tile.at[:, here] for here in channels])
    return acc, top, total


def _call(plan: Plan, lane: Device, B: int, T: int, window_parts: int, entry_parts: int, interpret: Any):
    """The compiled kernel's function; pools are passed in parts, one of bf16 rows, three of FP8."""
    D, H, P = plan.width, plan.head_tiles * HEADS, plan.splits

    def sparse_mla(tiles, count, index, sinks, q, *refs):
        window, refs = refs[:window_parts], refs[window_parts:]
        entries, refs = refs[:entry_parts], refs[entry_parts:]
        _kernel(tiles, count, index, sinks, q, window, entries, *refs, lane=lane, plan=plan)

    return plgpu.kernel(
        sparse_mla,
        out_type=(
            jax.ShapeDtypeStruct((B, T, P, H, D), jnp.bfloat16 if P == 1 else jnp.float32),
            jax.ShapeDtypeStruct((B, T, P, H), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((1, HEADS, D), jnp.bfloat16, transforms=tiled(lane.swizzle)),
            plgpu.SMEM((GATHER, ROWS, D), jnp.bfloat16, transforms=tiled(lane.swizzle)),
            plgpu.SMEM((GATHER, ROWS), jnp.int32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=GATHER),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=GATHER),
            plgpu.Barrier(num_arrivals=COMPUTE),
            *lane.scratch(D),
        ],
        grid=(plan.head_tiles * plan.splits * B * T,),
        grid_names=("work",),
        num_threads=COMPUTE + GATHER,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )


def sparse_mla_gpu(
    q: jax.Array,
    positions: jax.Array,
    window: Window,
    entries,
    picks: Picks | None,
    sinks: jax.Array,
    *,
    scale: float,
    chip: Chip,
    return_lse: bool = False,
    interpret: Any = None,
):
    """See `reference.sparse_mla`; compiled for the GPU `chip`.

    q is bfloat16 with H a multiple of 64 and D of 256, at most 512. Window rows have distinct positions. A row nobody
    picks may hold anything. `interpret` is None, or Pallas's InterpretGPUParams for a run on CPU.

    Raises:
      ValueError: the shapes disagree or do not fit the kernel, or the chip has neither wgmma nor tcgen05.
    """
    lane = device_of(chip, "sparse_mla_gpu", interpret)
    check_shapes(q, positions, window, entries, picks, sinks)
    _check_operands(q, window, entries)
    (B, T, H, D), count = q.shape, jnp.zeros(q.shape[:2], jnp.int32)
    index = _window_index(positions, window)
    tiles = jnp.full((B, T), index.shape[-1] // ROWS, jnp.int32)
    window_tiles, by_count = index.shape[-1] // ROWS, isinstance(picks, FirstN)
    if isinstance(picks, FirstN):
        count = jnp.clip(picks.count, 0, entries.shape[1]).astype(jnp.int32)
        tiles = tiles + (count + ROWS - 1) // ROWS
    elif picks is not None:
        listed = _padded(picks.index if isinstance(picks, Indices) else _listed(as_mask(picks)))
        last = jnp.max(jnp.where(listed >= 0, jnp.arange(1, listed.shape[-1] + 1), 0), axis=-1)
        tiles = tiles + (last + ROWS - 1) // ROWS
        index = jnp.concatenate([index, listed], axis=-1)
    most = window_tiles + (0 if picks is None else -(-_most_picks(picks, entries) // ROWS))
    plan = Plan(window_tiles, by_count, _splits(chip, B * T * H // HEADS, most), H // HEADS, D, scale)
    sinks = sinks.astype(jnp.float32)
    pools = _parts(window.rows), () if entries is None else _parts(entries)
    call = _call(plan, lane, B, T, len(pools[0]), len(pools[1]), interpret)
    out, lse = call(tiles, count, index, sinks, q, *pools[0], *pools[1])
    out, lse = _combine(out, lse, sinks) if plan.splits > 1 else (out[:, :, 0], lse[:, :, 0])
    return (out, lse) if return_lse else out


def _check_operands(q, window: Window, entries) -> None:
    H, D = q.shape[2:]
    if H % HEADS or D not in (256, 512):
        raise ValueError(
            f"sparse_mla_gpu: {H} heads of {D} channels; pad the heads to a multiple of {HEADS}, D to 256 or 512"
        )
    pools = [window.rows] + ([] if entries is None else [entries])
    types = [q.dtype] + [rows.dtype for rows in pools if not isinstance(rows, Fp8Rows)]
    if any(dtype != jnp.bfloat16 for dtype in types):
        raise ValueError(f"sparse_mla_gpu: q and rows are {[str(t) for t in types]}; cast to bfloat16, or pass Fp8Rows")


def _parts(rows) -> tuple:
    return (rows.codes, rows.scales, rows.rope) if isinstance(rows, Fp8Rows) else (rows,)


def _window_index(positions, window: Window):
    """int32 [B, T, size up to whole tiles]: the window rows a query sees, -1 elsewhere."""
    B, T = positions.shape
    if window.is_band:
        slots = jnp.arange(T)[:, None] + jnp.arange(window.size)
        held = window.positions[:, slots]
        seen = (held >= 0) & (held <= positions[..., None]) & (held > positions[..., None] - window.size)
        return _padded(jnp.where(seen, slots, -1))
    age = positions[:, :, None] - window.positions[:, None, :]
    place = jnp.where(window.visible(positions), age, window.size)  # past the end: dropped
    slots = jnp.broadcast_to(jnp.arange(age.shape[-1], dtype=jnp.int32), age.shape)
    b, t = jnp.arange(B)[:, None, None], jnp.arange(T)[:, None]
    return _padded(jnp.full((B, T, window.size), -1, jnp.int32).at[b, t, place].set(slots, mode="drop"))


def _padded(index):
    return jnp.pad(index, ((0, 0), (0, 0), (0, -index.shape[-1] % ROWS)), constant_values=-1).astype(jnp.int32)


def _listed(mask):
    """The entries a mask picks, in order, then -1."""
    N = mask.shape[-1]
    index = jnp.sort(jnp.where(mask, jnp.arange(N, dtype=jnp.int32), N), axis=-1)
    return jnp.where(index == N, -1, index)


def _most_picks(picks: Picks, entries) -> int:
    return picks.index.shape[-1] if isinstance(picks, Indices) else entries.shape[1]


def _splits(chip: Chip, blocks: int, tiles: int) -> int:
    """Enough blocks for every multiprocessor, none of them without a tile."""
    return max(1, min(MAX_SPLITS, tiles, chip.cores // blocks))


def _combine(out, lse, sinks):
    """fp32 [B, T, splits, H, D] and their log-sum-exps, to one output in bf16 and its log-sum-exp, sinks included."""
    whole = jnp.logaddexp(jax.nn.logsumexp(lse, axis=2), sinks)
    weights = jnp.exp(lse - jnp.where(jnp.isfinite(whole), whole, 0.0)[:, :, None])
    return (out * weights[..., None]).sum(2).astype(jnp.bfloat16), whole
