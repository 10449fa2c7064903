"""FP8 products on NVIDIA GPUs, by Mosaic GPU: Hopper (sm_90a, wgmma) and Blackwell (sm_100a, tcgen05).

A fixed set of thread blocks, one a multiprocessor, walks over the tiles of the result. One warpgroup fetches tiles by
TMA into a ring of stages, the others multiply. Every product of 128 channels starts afresh in the tensor core and is
scaled in fp32 as it joins the sum, so a scale costs one multiply-add an element and its value may be anything.

Two shapes of tile. Many rows of codes on Hopper (`_many_rows`): the rows are the M side of wgmma, 64 x 256 a
warpgroup. All else (`weights_first`): the weights are the M side, so that a few rows fill the tensor core and bf16
weights, made from the codes in registers, need not be stored; the sum over channels may be split among blocks.
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
from pallas_kernels.fp8_matmul.gpu_device import CODE_TILE, WIDE_TILE, Blackwell, Device, device_of
from pallas_kernels.fp8_matmul.reference import (
    BLOCK,
    check_groups,
    check_shapes,
    inverse_rope,
    result_dtype,
    scale_value,
)

HALF = 64  # rows of wgmma's M side
COMPUTE = 2  # warpgroups of `_many_rows` that multiply
ROWS_TILE = 128  # rows of its tiles
PART = 64  # weights of one of its products: ptxas then works on one part while the next is multiplied, without spills
MANY_ROWS = 64  # rows of codes above which it is taken
SCALES = 32  # fp32 values, the fewest that a copy takes
MAX_STAGES, MAX_SPLITS = 8, 16
ITEM_STEPS = 2  # what starting and storing an item costs, in steps
SNAKE = 8  # tiles abreast, so that blocks at work at one time share operands in the L2 cache
RESERVED_BYTES = 2048  # shared memory for barriers and alignment


@dataclass(frozen=True)
class Plan:
    """What is fixed when a kernel is compiled.

    rows, weights: of a tile; row_tiles, weight_tiles, steps: tiles of rows, of weights, of channels.
    splits: parts of each sum, which XLA adds up; 0 where the kernel stores the result itself.
    stages: of the ring; cores: thread blocks; groups: of weights, each with channels of its own.
    """

    rows: int
    weights: int
    row_tiles: int
    weight_tiles: int
    steps: int
    splits: int
    stages: int
    cores: int
    groups: int = 1

    @property
    def items(self) -> int:
        return self.row_tiles * self.weight_tiles * max(self.splits, 1)


def fetch(plan: Plan, it, full, empty, copies) -> None:
    """Start the copies (source, ring) of step `it` into their stage, once its last use is over."""
    slot = jax.lax.rem(it, plan.stages)

    @pl.when(it >= plan.stages)
    def _reuse():
        plgpu.barrier_wait(empty.at[slot])

    for source, ring in copies:
        plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])


def drain(plan: Plan, total, empty) -> None:
    """Wait for the last uses of the stages, after `total` steps: no barrier may be left half way."""

    def wait(it, _):
        plgpu.barrier_wait(empty.at[jax.lax.rem(it, plan.stages)])
        return ()

    jax.lax.fori_loop(jnp.maximum(total - plan.stages, 0), total, wait, ())


def items_of(plan: Plan, core):
    """How many of the items core, core + cores, .. there are."""
    return jax.lax.div(plan.items - core + (plan.cores - 1), plan.cores)


def _many_rows(x, w, x_scale, scale, out, out_tile, full, empty, *rings, lane: Device, plan: Plan):
    """x [M, K] and w [N, K] codes, x_scale fp32 [K / 128, M], scale fp32 [K / 128, N / 128 and more] -> out [M, N]."""
    core, warpgroup = jax.lax.axis_index("core"), jax.lax.axis_index("warpgroup")

    def place(i):
        tiles = (plan.row_tiles, plan.weight_tiles)
        row, weight = plgpu.planar_snake(core + i * plan.cores, tiles, 0, SNAKE)
        return row * ROWS_TILE, weight * plan.weights

    @pl.when(warpgroup == COMPUTE)
    def _fetch():
        lane.set_registers(fetches=True, many_rows=True)

        def tile(i, _):
            row, weight = place(i)
            rows, weights = pl.ds(row, ROWS_TILE), pl.ds(weight, plan.weights)

            def step(k, _):
                channels = pl.ds(k * BLOCK, BLOCK)
                scales = x_scale.at[k, rows], scale.at[k, pl.ds(jax.lax.div(weight, BLOCK), SCALES)]
                sources = x.at[rows, channels], w.at[weights, channels], *scales
                fetch(plan, i * plan.steps + k, full, empty, zip(sources, rings, strict=True))
                return ()

            return jax.lax.fori_loop(0, plan.steps, step, ())

        jax.lax.fori_loop(0, items_of(plan, core), tile, ())
        drain(plan, items_of(plan, core) * plan.steps, empty)

    @pl.when(warpgroup < COMPUTE)
    def _compute():
        lane.set_registers(fetches=False, many_rows=True)

        def tile(i, _):
            row, weight = place(i)
            acc = _sum_rows(plan, lane, i * plan.steps, warpgroup * HALF, rings, full, empty)
            _store_rows(lane, out, out_tile.at[warpgroup], acc, row + warpgroup * HALF, weight)
            return ()

        jax.lax.fori_loop(0, items_of(plan, core), tile, ())
        plgpu.wait_smem_to_gmem(0)


def _sum_rows(plan: Plan, lane: Device, start, first, rings, full, empty) -> list:
    """The sums of 64 rows from `first` on, in parts of PART weights."""
    x_ring, w_ring, x_scales, w_scales = rings

    def step(k, acc):
        slot = jax.lax.rem(start + k, plan.stages)
        plgpu.barrier_wait(full.at[slot])
        lines = lane.load_lines(x_scales.at[slot, pl.ds(first, HALF)])
        rows = x_ring.at[slot, pl.ds(first, HALF)]
        total = []
        for n, part in enumerate(acc):
            [product] = lane.product(rows, w_ring.at[slot, pl.ds(n * PART, PART)])
            factors = lines * w_scales[slot, n * PART // BLOCK]
            total.append(part + product * jax.lax.broadcast_in_dim(factors, product.shape, [0]))
        plgpu.barrier_arrive(empty.at[slot])
        return total

    return jax.lax.fori_loop(0, plan.steps, step, [lane.zeros((HALF, PART)) for _ in range(plan.weights // PART)])


def _store_rows(lane: Device, out, out_tile, acc, row, weight) -> None:
    for n, part in enumerate(acc):
        for column in range(0, part.shape[1], HALF):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            lane.store(out_tile, part[:, column : column + HALF].astype(out.dtype))
            plgpu.commit_smem()
            columns = pl.ds(weight + (n * PART + column), HALF)
            plgpu.copy_smem_to_gmem(out_tile, out.at[pl.ds(row, HALF), columns])


@dataclass(frozen=True)
class Place:
    """Where an item reads and writes: first row and channel of x, first row of w, first column of the result, its
    split, and the steps [low, high) of its sum."""

    row: Any
    channel: Any
    weight: Any
    column: Any
    split: Any
    low: Any
    high: Any


class Fp8Weights:
    """How `weights_first` reads FP8 weights: codes as they are for rows of codes, widened in registers for bf16."""

    def __init__(self, lane: Device, w_ring, x_ring, x_scales, scale):
        self.lane, self.w_ring, self.x_ring, self.x_scales, self.scale = lane, w_ring, x_ring, x_scales, scale

    def ahead(self, place: Place, k, first):
        """What step `k` needs from global memory, loaded a step before."""
        return scale_value(self.scale[jax.lax.div(place.weight, BLOCK), k])

    def product(self, slot, first, ahead):
        """Weights first .. first + height - 1 with all rows of the tile, scaled: parts fp32 [height, some rows]."""
        codes = self.w_ring.at[slot, pl.ds(first, self.lane.height)]
        if self.x_scales is None:
            yield from (part * ahead for part in self.lane.product(self.lane.widen(codes), self.x_ring.at[slot]))
            return
        for n, part in enumerate(self.lane.product(codes, self.x_ring.at[slot])):
            width = part.shape[1]
            columns = self.lane.load_columns(self.x_scales.at[slot, pl.ds(n * width, width)])
            yield part * self.lane.across(columns * ahead, part.shape)


def weights_first(plan: Plan, lane: Device, place_of, sources, rings, weights, out, out_tile, full, empty) -> None:
    """The kernel's body for one warpgroup: walk over the items of this thread block.

    Args:
      place_of: index of an item -> Place.
      sources: (place, step) -> what to copy into each of `rings`.
      weights: `Fp8Weights` or the like.
      out: bf16 [rows, columns] with out_tile; or fp32 [splits, columns, rows] and None.
    """
    core, warpgroup = jax.lax.axis_index("core"), jax.lax.axis_index("warpgroup")
    mine, first = items_of(plan, core), warpgroup * lane.height

    @pl.when(warpgroup == lane.warpgroups)
    def _fetch():
        lane.set_registers(fetches=True)

        def item(i, start):
            place = place_of(core + i * plan.cores)

            def step(k, it):
                fetch(plan, it, full, empty, zip(sources(place, k), rings, strict=True))
                return it + 1

            return jax.lax.fori_loop(place.low, place.high, step, start)

        drain(plan, jax.lax.fori_loop(0, mine, item, jnp.int32(0)), empty)

    @pl.when(warpgroup < lane.warpgroups)
    def _compute():
        lane.set_registers(fetches=False)

        def item(i, start):
            place = place_of(core + i * plan.cores)

            def step(k, carry):
                acc, now, it = carry
                ahead = weights.ahead(place, jnp.minimum(k + 1, plan.steps - 1), first)
                slot = jax.lax.rem(it, plan.stages)
                plgpu.barrier_wait(full.at[slot])
                acc = [part + more for part, more in zip(acc, weights.product(slot, first, now), strict=True)]
                plgpu.barrier_arrive(empty.at[slot])
                return acc, ahead, it + 1

            width = min(plan.rows, lane.part)
            zeros = [lane.zeros((lane.height, width)) for _ in range(plan.rows // width)]
            carry = zeros, weights.ahead(place, place.low, first), start
            acc, _, it = jax.lax.fori_loop(place.low, place.high, step, carry)
            columns = pl.ds(place.column + first, lane.height)
            if out_tile is None:
                for n, part in enumerate(acc):
                    out[place.split, columns, pl.ds(place.row + n * width, width)] = part
                return it
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile = out_tile.at[warpgroup]
            for n, part in enumerate(acc):
                lane.store(tile.at[pl.ds(n * width, width)], part.astype(out.dtype), transposed=True)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out.at[pl.ds(place.row, plan.rows), columns])
            return it

        jax.lax.fori_loop(0, mine, item, jnp.int32(0))
        if out_tile is not None:
            plgpu.wait_smem_to_gmem(0)


def call_weights_first(x, w, x_scale, scale, *, plan: Plan, lane: Device, interpret: Any):
    """x [M, groups * K] codes with x_scale fp32 [K / 128, M or 32] or bf16 with None, w [N, K], scale
    [N / 128, K / 128] -> bf16 [M, N], or fp32 [splits, N, M] if plan.splits."""
    wide, whole, parts = x_scale is None, not plan.splits, max(plan.splits, 1)
    per_group = plan.weight_tiles // plan.groups

    def place_of(item):
        item, split = divided(item, parts)
        row, tile = plgpu.planar_snake(item, (plan.row_tiles, plan.weight_tiles), 0, SNAKE)
        channel = jax.lax.div(tile, per_group) * (plan.steps * BLOCK)
        low, high = (jax.lax.div((split + n) * plan.steps, parts) for n in (0, 1))
        return Place(row * plan.rows, channel, tile * BLOCK, tile * BLOCK, split, low, high)

    operands = (w, x) if wide else (w, x, x_scale)

    def kernel(*refs):
        (*inputs, scale, out, full, empty), refs = refs[: len(operands) + 4], refs[len(operands) + 4 :]
        out_tile, refs = (refs[0], refs[1:]) if whole else (None, refs)
        rings, device = refs[: len(operands)], lane.bound(*refs[len(operands) :])

        def sources(place, k):
            rows = pl.ds(place.row, plan.rows), pl.ds(place.row, max(plan.rows, SCALES))
            yield inputs[0].at[pl.ds(place.weight, BLOCK), pl.ds(k * BLOCK, BLOCK)]
            yield inputs[1].at[rows[0], pl.ds(place.channel + k * BLOCK, BLOCK)]
            yield from (x_scale.at[k, rows[1]] for x_scale in inputs[2:])

        weights = Fp8Weights(device, rings[0], rings[1], None if wide else rings[2], scale)
        weights_first(plan, device, place_of, sources, rings, weights, out, out_tile, full, empty)

    rings = [
        plgpu.SMEM((plan.stages, BLOCK, BLOCK), w.dtype, transforms=CODE_TILE),
        plgpu.SMEM((plan.stages, plan.rows, BLOCK), x.dtype, transforms=WIDE_TILE if wide else CODE_TILE),
        plgpu.SMEM((plan.stages, max(plan.rows, SCALES)), jnp.float32),
    ][: len(operands)]
    return plgpu.kernel(
        kernel,
        out_type=result_type(plan, x.shape[0], w.shape[0]),
        scratch_types=[
            plgpu.Barrier(num_arrivals=len(rings), num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=lane.warpgroups, num_barriers=plan.stages),
            *([out_tile_type(plan, lane)] if whole else []),
            *rings,
            *lane.scratch(plan.rows, BLOCK, wide),
        ],
        **launch("fp8_matmul" if plan.groups == 1 else "fp8_output_projection", plan, lane, interpret),
    )(*operands, scale)


def result_type(plan: Plan, M: int, N: int):
    if plan.splits:
        return jax.ShapeDtypeStruct((plan.splits, N, M), jnp.float32)
    return jax.ShapeDtypeStruct((M, N), jnp.bfloat16)


def out_tile_type(plan: Plan, lane: Device):
    shape = lane.warpgroups, plan.rows, lane.height
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=WIDE_TILE)


def divided(a, b: int):
    return jax.lax.div(a, b), jax.lax.rem(a, b)


def weights_first_plan(
    chip: Chip, lane: Device, M: int, N: int, K: int, *, x_bytes: int, groups: int = 1, whole: bool = True
) -> Plan:
    """Tiles of as many rows as there are, up to 128; `whole` allows the kernel to store the result itself."""
    rows = next((n for n in (8, 16, 32, 64) if max(M, lane.narrowest) <= n), 128)
    row_tiles, weight_tiles, steps = -(-M // rows), N // BLOCK, K // BLOCK
    splits = split_sum(chip, row_tiles * weight_tiles, steps)
    splits = 0 if whole and splits == 1 else splits
    stage = BLOCK * BLOCK + rows * BLOCK * x_bytes + (0 if x_bytes > 1 else 4 * max(rows, SCALES))
    stages = ring_stages(chip, stage, fixed_bytes(lane, rows, BLOCK, x_bytes > 1, whole=not splits))
    items = row_tiles * weight_tiles * max(splits, 1)
    return Plan(rows, BLOCK, row_tiles, weight_tiles, steps, splits, stages, min(chip.cores, items), groups)


def fixed_bytes(lane: Device, rows: int, channels: int, is_wide: bool, *, whole: bool) -> int:
    """Shared memory of `weights_first` besides its ring: the tile that is stored, and the device's own."""
    left = lane.height * channels * 2 if is_wide and isinstance(lane, Blackwell) else 0
    return left + (BLOCK * rows * 2 if whole else 0)


def split_sum(chip: Chip, tiles: int, steps: int) -> int:
    """Into how many parts to cut each sum: the fewest steps for the busiest block, each item costing a few more."""
    cost = lambda n: -(-tiles * n // chip.cores) * (-(-steps // n) + ITEM_STEPS)
    return min(range(1, min(steps, MAX_SPLITS) + 1), key=cost)


def many_rows_plan(chip: Chip, M: int, N: int, K: int) -> Plan:
    """Tiles of 128 x 256, or x 128 where that many would not occupy every multiprocessor."""
    row_tiles, steps = M // ROWS_TILE, K // BLOCK
    weights = 2 * BLOCK if row_tiles * (N // (2 * BLOCK)) > chip.cores and N % (2 * BLOCK) == 0 else BLOCK
    stage = (ROWS_TILE + weights) * BLOCK + 4 * ROWS_TILE + 4 * SCALES
    stages = ring_stages(chip, stage, COMPUTE * HALF * HALF * 2)
    items = row_tiles * (N // weights)
    return Plan(ROWS_TILE, weights, row_tiles, N // weights, steps, 0, stages, min(chip.cores, items))


def ring_stages(chip: Chip, stage_bytes: int, other_bytes: int) -> int:
    return min(MAX_STAGES, (chip.smem_bytes - other_bytes - RESERVED_BYTES) // stage_bytes)


def call_many_rows(x, w, x_scale, scale, *, plan: Plan, lane: Device, interpret: Any):
    return plgpu.kernel(
        lambda *refs: _many_rows(*refs, lane=lane, plan=plan),
        out_type=jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((COMPUTE, HALF, HALF), jnp.bfloat16, transforms=WIDE_TILE),
            plgpu.Barrier(num_arrivals=4, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=plan.stages),
            plgpu.SMEM((plan.stages, ROWS_TILE, BLOCK), x.dtype, transforms=CODE_TILE),
            plgpu.SMEM((plan.stages, plan.weights, BLOCK), w.dtype, transforms=CODE_TILE),
            plgpu.SMEM((plan.stages, ROWS_TILE), jnp.float32),
            plgpu.SMEM((plan.stages, SCALES), jnp.float32),
        ],
        **launch("fp8_matmul", plan, lane, interpret),
    )(x, w, x_scale, scale)


def launch(name: str, plan: Plan, lane: Device, interpret: Any) -> dict[str, Any]:
    """Arguments of `plgpu.kernel` that all kernels here share."""
    return dict(
        kernel_name=name,
        grid=(plan.cores,),
        grid_names=("core",),
        num_threads=lane.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )


def fp8_matmul_gpu(
    x,
    w,
    scale,
    *,
    x_scale: jax.Array | None = None,
    out_dtype: Any = None,
    chip: Chip,
    interpret: Any = None,
) -> jax.Array:
    """See `reference.fp8_matmul`; compiled for the GPU `chip`.

    x is bfloat16, or float8_e4m3fn with x_scale; out_dtype bfloat16 or float32. Widths that are no multiple of 128 are
    padded on every call, the weights too: pad them once instead. `interpret` is None, or Pallas's InterpretGPUParams
    for a run on CPU.

    Raises:
      ValueError: the shapes or types disagree or do not fit the kernel, or the chip has neither wgmma nor tcgen05.
    """
    lane = device_of(chip, "fp8_matmul_gpu", interpret)
    check_shapes(x, w, scale, x_scale)
    _check_wide("fp8_matmul_gpu", x)
    out_dtype = result_dtype(x, out_dtype)
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"fp8_matmul_gpu: out_dtype={out_dtype}; choose bfloat16 or float32")
    *lead, K = x.shape
    N, M = w.shape[0], math.prod(lead)
    x = padded(x.reshape(M, K), (1, BLOCK))
    w = padded(w, (BLOCK, BLOCK))
    if x_scale is not None:
        x_scale = scale_value(x_scale.reshape(M, -1)).T
        plan = many_rows_plan(chip, -(-M // ROWS_TILE) * ROWS_TILE, *w.shape)
        if lane.warpgroups == COMPUTE and M > MANY_ROWS and plan.items * 2 > chip.cores and out_dtype == jnp.bfloat16:
            x, x_scale = padded(x, (ROWS_TILE, 1)), padded(x_scale, (1, ROWS_TILE))
            # A copy takes 32 scales from any column on, of rows that are a multiple of 16 bytes.
            scales = jnp.pad(scale_value(scale).T, ((0, 0), (0, SCALES + -scale.shape[0] % 4)))
            out = call_many_rows(x, w, x_scale, scales, plan=plan, lane=lane, interpret=interpret)
            return out[:M, :N].reshape(*lead, N)
    plan = weights_first_plan(chip, lane, M, *w.shape, x_bytes=x.dtype.itemsize, whole=out_dtype == jnp.bfloat16)
    out = _run_weights_first(x, w, x_scale, scale, plan=plan, lane=lane, interpret=interpret)
    return out[:M, :N].astype(out_dtype).reshape(*lead, N)


def grouped_output_projection_gpu(
    o,
    cos,
    sin,
    w,
    scale,
    *,
    groups: int,
    chip: Chip,
    interpret: Any = None,
) -> jax.Array:
    """See `reference.grouped_output_projection`; compiled for the GPU `chip`, o in bfloat16.

    The rotation is one elementwise pass of XLA's in front of the products.

    Raises:
      ValueError: the shapes or types disagree, a group's channels or rows are no multiple of 128, or the chip has
        neither wgmma nor tcgen05.
    """
    op = "grouped_output_projection_gpu"
    lane = device_of(chip, op, interpret)
    check_groups(o, cos, sin, w, scale, groups)
    _check_wide(op, o)
    B, T, H, D = o.shape
    N, K = w.shape
    if K % BLOCK or (N // groups) % BLOCK:
        raise ValueError(f"{op}: a group's weights are {N // groups} x {K}; pad both to multiples of {BLOCK}")
    x = inverse_rope(o, cos, sin).reshape(B * T, H * D)
    plan = weights_first_plan(chip, lane, B * T, N, K, x_bytes=2, groups=groups)
    out = _run_weights_first(x, w, None, scale, plan=plan, lane=lane, interpret=interpret)
    return out[: B * T].astype(o.dtype).reshape(B, T, N)


def _run_weights_first(x, w, x_scale, scale, *, plan: Plan, lane: Device, interpret: Any):
    x = padded(x, (plan.rows, 1))
    if x_scale is not None:
        x_scale = padded(x_scale, (1, max(plan.rows, SCALES)))
    out = call_weights_first(x, w, x_scale, scale, plan=plan, lane=lane, interpret=interpret)
    return out.sum(0).T if plan.splits else out


def _check_wide(op: str, x) -> None:
    if x.dtype == jnp.float32:
        raise ValueError(f"{op}: no tensor core multiplies float32 exactly; cast to bfloat16, or use the xla op")


def padded(x, multiples: tuple[int, int]):
    """x [a, b] with zeros up to multiples of both."""
    pad = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, pad) if any(after for _, after in pad) else x
