"""Routed experts' products on NVIDIA GPUs, by Mosaic GPU: packed FP4 or FP8 weights, sorted rows in bf16.

The kernel is `fp8_matmul.gpu.weights_first` with other places: an item is a block of rows with 128 weights of its
expert. FP4 weights reach shared memory packed; a thread moves the bits of 32 channels of a row to bf16 places and
multiplies by their one scale, in registers. What a thread so holds are not the channels that the tensor core expects of
it, so the rows of x are put in the same order beforehand (`fragment_order`): a sum does not mind.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import Chip
from pallas_kernels.fp8_matmul.gpu import (
    SNAKE,
    Fp8Weights,
    Place,
    Plan,
    divided,
    fixed_bytes,
    launch,
    out_tile_type,
    result_type,
    ring_stages,
    split_sum,
    weights_first,
)
from pallas_kernels.fp8_matmul.gpu_device import (
    CODE_TILE,
    FP4_STEP,
    WIDE_TILE,
    Device,
    device_of,
    fragment_order,
)
from pallas_kernels.fp8_matmul.reference import BLOCK

MAX_ROWS = 128  # of a tile


class Fp4Weights:
    """How `weights_first` reads packed FP4 weights."""

    def __init__(self, lane: Device, w_ring, x_ring, scale):
        self.lane, self.w_ring, self.x_ring, self.scale = lane, w_ring, x_ring, scale

    def ahead(self, place: Place, k, first):
        return self.lane.load_fp4_scales(self.scale, place.weight + first, k)

    def product(self, slot, first, ahead):
        weights = self.lane.expand(self.w_ring.at[slot, pl.ds(first, self.lane.height)], ahead)
        yield from self.lane.product(weights, self.x_ring.at[slot])


def _call(x, block_expert, blocks_used, w, scale, *, plan: Plan, tiles: int, N: int, lane: Device, interpret: Any):
    """x [blocks * rows, K] in the kernel's order, w [E * N, K or K / 2], scale [E * N or / 128, ..] ->
    bf16 [blocks * rows, N], or fp32 [splits, N, blocks * rows] if plan.splits.

    tiles: of plan.rows rows that a block of rows has.
    """
    fp4 = w.dtype == jnp.uint8
    channels, bytes_of_step = (FP4_STEP, FP4_STEP // 2) if fp4 else (BLOCK, BLOCK)
    whole, parts = not plan.splits, max(plan.splits, 1)

    def kernel(x, block_expert, blocks_used, w, scale, out, full, empty, w_ring, x_ring, *refs):
        out_tile, refs = (refs[0], refs[1:]) if whole else (None, refs)
        device = lane.bound(*refs)

        def place_of(item):
            item, split = divided(item, parts)
            row, tile = plgpu.planar_snake(item, (plan.row_tiles, plan.weight_tiles), 0, SNAKE)
            block = jax.lax.div(row, tiles)
            used = jnp.where(block < blocks_used[0], 1, 0)
            low, high = (jax.lax.div((split + n) * plan.steps, parts) * used for n in (0, 1))
            weight = block_expert[block] * N + tile * BLOCK
            return Place(row * plan.rows, 0, weight, tile * BLOCK, split, low, high)

        def sources(place, k):
            weights = w.at[pl.ds(place.weight, BLOCK), pl.ds(k * bytes_of_step, bytes_of_step)]
            return weights, x.at[pl.ds(place.row, plan.rows), pl.ds(k * channels, channels)]

        weights = Fp4Weights(device, w_ring, x_ring, scale) if fp4 else Fp8Weights(device, w_ring, x_ring, None, scale)
        weights_first(plan, device, place_of, sources, (w_ring, x_ring), weights, out, out_tile, full, empty)

    return plgpu.kernel(
        kernel,
        out_type=result_type(plan, x.shape[0], N),
        scratch_types=[
            plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=lane.warpgroups, num_barriers=plan.stages),
            plgpu.SMEM((plan.stages, BLOCK, bytes_of_step), w.dtype, transforms=CODE_TILE),
            plgpu.SMEM((plan.stages, plan.rows, channels), x.dtype, transforms=WIDE_TILE),
            *([out_tile_type(plan, lane)] if whole else []),
            *lane.scratch(plan.rows, channels, True),
        ],
        **launch("expert_matmul", plan, lane, interpret),
    )(x, block_expert, blocks_used, w, scale)


def expert_plan(chip: Chip, lane: Device, rows: int, row_tiles: int, N: int, K: int, *, packed: bool) -> Plan:
    """For `row_tiles` tiles of `rows` rows, a multiple of 8."""
    channels = FP4_STEP if packed else BLOCK
    weight_tiles, steps = N // BLOCK, K // channels
    splits = split_sum(chip, row_tiles * weight_tiles, steps)
    splits = 0 if splits == 1 else splits
    stage = BLOCK * channels // (2 if packed else 1) + rows * channels * 2
    stages = ring_stages(chip, stage, fixed_bytes(lane, rows, channels, True, whole=not splits))
    items = row_tiles * weight_tiles * max(splits, 1)
    return Plan(rows, BLOCK, row_tiles, weight_tiles, steps, splits, stages, min(chip.cores, items))


def expert_matmul_gpu(
    x,
    block_expert,
    blocks_used,
    w,
    scale,
    *,
    packed: bool,
    chip: Chip,
    interpret: Any = None,
) -> jax.Array:
    """See `reference.expert_matmul`; compiled for the GPU `chip`, x in bfloat16.

    N must be a multiple of 128, K of 128, or of 256 if `packed`. `interpret` is None, or Pallas's InterpretGPUParams
    for a run on CPU.

    Raises:
      ValueError: the shapes or types disagree or do not fit the kernel, or the chip has neither wgmma nor tcgen05.
    """
    lane = device_of(chip, "expert_matmul_gpu", interpret)
    _check(x, block_expert, w, scale, packed)
    blocks, (E, N), K = block_expert.shape[0], w.shape[:2], x.shape[1]
    rows = x.shape[0] // blocks
    tile_rows = min(-(-rows // lane.narrowest) * lane.narrowest, MAX_ROWS)
    tiles = -(-rows // tile_rows)
    x = jnp.pad(x.reshape(blocks, rows, K), ((0, 0), (0, tiles * tile_rows - rows), (0, 0))).reshape(-1, K)
    plan = expert_plan(chip, lane, tile_rows, blocks * tiles, N, K, packed=packed)
    out = _call(
        fragment_order(x) if packed else x,
        block_expert.astype(jnp.int32),
        jnp.reshape(blocks_used, (1,)).astype(jnp.int32),
        w.reshape(E * N, -1),
        scale.reshape(-1, scale.shape[-1]),
        plan=plan,
        tiles=tiles,
        N=N,
        lane=lane,
        interpret=interpret,
    )
    out = out.sum(0).T.astype(x.dtype) if plan.splits else out
    return out.reshape(blocks, -1, N)[:, :rows].reshape(blocks * rows, N)


def _check(x, block_expert, w, scale, packed: bool) -> None:
    E, N, width = w.shape
    K, per_byte = x.shape[1], 2 if packed else 1
    blocks = block_expert.shape[0]
    if x.shape[0] % blocks or width * per_byte != K:
        raise ValueError(f"expert_matmul_gpu: {x.shape=} in {blocks} blocks does not fit {w.shape=} ({packed=})")
    if N % BLOCK or K % (FP4_STEP if packed else BLOCK):
        raise ValueError(f"expert_matmul_gpu: {N=} must be a multiple of 128, {K=} of 128, packed of {FP4_STEP}; pad")
    kinds = (jnp.uint8,) if packed else (jnp.uint8, jnp.float32)
    shape = (E, N, K // 32) if packed else (E, N // BLOCK, K // BLOCK)
    if scale.shape != shape or scale.dtype not in kinds:
        raise ValueError(f"expert_matmul_gpu: {scale.shape=} of {scale.dtype}; expected {shape}, e8m0 as uint8")
    if x.dtype != jnp.bfloat16 or w.dtype != (jnp.uint8 if packed else jnp.float8_e4m3fn):
        raise ValueError(f"expert_matmul_gpu: {x.dtype=}, {w.dtype=}; give bfloat16 and uint8 pairs or float8_e4m3fn")
