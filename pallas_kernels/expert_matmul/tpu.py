"""Routed experts' products on TPU, by Mosaic: a block of rows times a tile of its expert's weights, read packed.

The grid walks over tiles of columns and, within one, over the blocks: where neighbours have one expert its tile is
read once. An e2m1 code `s ee m` becomes an 8-bit float by moving its bits: as e5m2 `s 000ee m0` it is the value times
2^-14, zero and 0.5 included, and every matrix unit here takes e5m2. A word of packed codes gives two words, of even and
of odd channels, so x comes with its columns in that order: 128 even ones, then 128 odd ones.

What shares a scale is 32 channels of one row of w. There are two ways to apply it (`TpuConfig.fold`):

* Few rows: the 256 channels of two such words are multiplied with eight copies of a row of x, each of which is zero but
  for one group of channels. The matrix unit then gives the sums of eight groups as eight rows, for the time it would
  take to multiply by one row alone, and the transposed scales multiply them there. v7x takes e2m1 codes as they are,
  and takes them transposed in twice the time: there the bytes are transposed first, which also puts the channels of a
  byte below each other, in their own order.
* Many rows: codes are widened to bfloat16 and multiplied by their scale, spread over its lanes, before the product.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.expert_matmul.reference import GROUP, check_shapes, pick_rows
from pallas_kernels.expert_matmul.tuning import TpuConfig, default_config
from pallas_kernels.fp8_matmul.reference import BLOCK, scale_value
from pallas_kernels.fp8_matmul.tpu import B11_FACTOR, BY_COLUMNS, VMEM_SHARE, mxu_codes, split_fp32

LANES, SUBLANES = 128, 8
SPAN = 2 * LANES  # channels in a register's width of packed codes
GROUPS = SPAN // GROUP
BY_ROWS = (((1,), (0,)), ((), ()))  # contract the last axis of one with the first of the other
EXPONENT_SHIFT = 14  # of an e2m1 code placed as e5m2
PIECE = 256  # columns summed at a time
HELD_BYTES, HELD_SHARE = 8, 0.25  # of each channel of a row that is held, and of the vector memory for all of them


@dataclass(frozen=True)
class Plan:
    """What is fixed when the kernel is compiled."""

    config: TpuConfig
    rows: int  # of a block
    blocks: int
    N: int
    K: int
    packed: bool
    native: bool  # the matrix unit takes e4m3fn codes
    native_fp4: bool  # and e2m1 codes
    out_dtype: Any
    stacks: int = 1  # of columns, in which turned scales come
    held: bool = False  # all rows of x, [n, K], and of a tile of the result are in vector memory
    one_core: bool = True

    @property
    def tiles(self) -> int:
        """Of columns."""
        return self.N // self.config.columns

    @property
    def turned(self) -> bool:
        """Whether scales come as [stacks, groups, columns]: so a TPU lays out groups that do not fill registers."""
        return self.packed and self.K // GROUP % LANES != 0

    @property
    def by_group(self) -> bool:
        return self.packed and not self.config.fold

    @property
    def in_order(self) -> bool:
        """Whether x comes with its channels as they are, not the even ones of each 256 before the odd ones."""
        return self.by_group and self.native_fp4

    @property
    def exponent_shift(self) -> int:
        return 0 if self.in_order else EXPONENT_SHIFT


def split_nibbles(packed: jax.Array) -> jax.Array:
    """uint8 [n, 128] pairs of e2m1 codes -> float8_e5m2 [n, 256] times 2^-14, low nibbles first."""
    words = pltpu.bitcast(packed, jnp.int32)
    low = ((words & 0x08080808) << 4) | ((words & 0x07070707) << 1)
    high = (words & jnp.int32(-0x7F7F7F80)) | (jax.lax.shift_right_logical(words, 3) & 0x0E0E0E0E)
    return jnp.concatenate([pltpu.bitcast(half, jnp.float8_e5m2) for half in (low, high)], axis=1)


def _factors(scale_ref, shift: int) -> jax.Array:
    """e8m0 bytes [columns, groups], or turned, -> bfloat16 powers of two times 2^shift, infinite where too large."""
    exponent = jnp.minimum(scale_ref[...].astype(jnp.int32) + shift, 255)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32).astype(jnp.bfloat16)


def _transposed(x: jax.Array) -> jax.Array:
    """bfloat16 [n, k] -> float32 [k, n], by the matrix unit, which turns one operand anyway."""
    k = x.shape[1]
    rows, lanes = (jax.lax.broadcasted_iota(jnp.int32, (k, k), axis) for axis in (0, 1))
    one = jnp.where(rows == lanes, 1.0, 0.0).astype(jnp.bfloat16)
    return jax.lax.dot_general(one, x, BY_COLUMNS, preferred_element_type=jnp.float32)


def _split_lanes(first: jax.Array, second: jax.Array, odd: int) -> jax.Array:
    """[n, 128] each, neighbours -> the even of their 256 columns, or the odd ones."""
    lane = jax.lax.broadcasted_iota(jnp.int32, first.shape, 1)
    first, second = (jnp.take_along_axis(x, 2 * lane % LANES + odd, axis=1) for x in (first, second))
    return jnp.where(lane < LANES // 2, first, second)


def _hold_rows(x_ref, held_ref, plan: Plan) -> None:
    """All of x in fp32, of which a row may be read anywhere, and in the order of the codes."""
    for start in range(0, plan.K, SPAN):
        cuts = pl.ds(start, LANES), pl.ds(start + LANES, LANES)
        # A single row is spread over a register, in which alone lanes can be permuted.
        halves = [jnp.broadcast_to(x_ref[:, cut], (held_ref.shape[0], LANES)).astype(jnp.float32) for cut in cuts]
        for i, cut in enumerate(cuts):
            held_ref[:, cut] = halves[i] if plan.in_order else _split_lanes(halves[0], halves[1], i)


def _spread_rows(row: Callable[[int, Any], jax.Array], spread_ref, plan: Plan) -> None:
    """Eight copies of each row of x, the g-th with only those channels of each 256 that are in their g-th group."""
    lane, copy = (jax.lax.broadcasted_iota(jnp.int32, (GROUPS, SPAN), axis) for axis in (1, 0))
    group = lane // GROUP if plan.in_order else lane % LANES // (LANES // GROUPS)
    mine = group == copy
    for start in range(0, plan.K, SPAN):
        cut = pl.ds(start, SPAN)
        rows = [jnp.where(mine, row(r, cut), 0.0) for r in range(plan.rows)]
        spread_ref[:, cut] = jnp.concatenate(rows, axis=0).astype(jnp.bfloat16)


def _sum_by_groups(row, w_ref, scale_ref, put, spread_ref, plan: Plan) -> None:
    """row(r, cut) reads channels of the r-th row, put(columns, sums) takes fp32 [1, columns] of each."""
    _spread_rows(row, spread_ref, plan)
    ends = [*range(PIECE, plan.config.columns - LANES, PIECE), plan.config.columns]  # none of 128 beside others: those
    for first, end in zip([0, *ends], ends, strict=False):  # are rows that cannot be put anywhere
        columns = pl.ds(first, end - first)
        if plan.turned:
            factors = _factors(scale_ref.at[0, :, columns], plan.exponent_shift).astype(jnp.float32)
        else:
            factors = _transposed(_factors(scale_ref.at[0, columns], plan.exponent_shift))
        total: Any = 0.0
        for i, start in enumerate(range(0, plan.K, SPAN)):
            packed, rows = w_ref[0, columns, pl.ds(start // 2, LANES)], spread_ref[:, pl.ds(start, SPAN)]
            if plan.in_order:
                codes, dims = pltpu.bitcast(packed.T, jnp.float4_e2m1fn), BY_ROWS
            else:
                codes, dims = split_nibbles(packed), BY_COLUMNS
            part = jax.lax.dot_general(rows, codes, dims, preferred_element_type=jnp.float32)
            factor = factors[i * GROUPS : (i + 1) * GROUPS]
            total = total + part * jnp.concatenate([factor] * plan.rows, axis=0)
        put(columns, [total[r * GROUPS : (r + 1) * GROUPS].sum(axis=0, keepdims=True) for r in range(plan.rows)])


def _widen_packed(w_ref, scale_ref, wide_ref, plan: Plan) -> None:
    """Weights in bfloat16 with their scale, in the order of x's columns."""
    factors = _factors(scale_ref.at[0], plan.exponent_shift)
    factors = factors.astype(jnp.float32).T.astype(jnp.bfloat16) if plan.turned else factors
    groups = factors.shape[1]
    factors = jnp.concatenate([factors] * (-(-LANES // groups)), axis=1) if groups < LANES else factors
    lane = jax.lax.broadcasted_iota(jnp.int32, (plan.config.columns // 2, LANES), 1)
    for i, start in enumerate(range(0, plan.K, SPAN)):
        first = i * GROUPS // LANES * LANES
        words = pltpu.bitcast(_lanes_from(factors, first), jnp.int32)  # two rows in a word
        spread = jnp.take_along_axis(words, lane // (LANES // GROUPS) + (i * GROUPS - first), axis=1)
        spread = pltpu.bitcast(spread, jnp.bfloat16)
        codes = split_nibbles(w_ref[0, :, pl.ds(start // 2, LANES)]).astype(jnp.bfloat16)
        wide_ref[:, pl.ds(start, SPAN)] = codes * jnp.concatenate([spread, spread], axis=1)


def _lanes_from(x: jax.Array, first: int) -> jax.Array:
    """128 lanes of x from `first` on; where x ends, its first ones again."""
    held = x[:, first : first + LANES]
    return held if held.shape[1] == LANES else jnp.concatenate([held, x[:, : LANES - held.shape[1]]], axis=1)


def _widen_fp8(w_ref, scale_ref, wide_ref, plan: Plan) -> None:
    for n in range(plan.config.columns // BLOCK):
        for k in range(plan.K // BLOCK):
            rows, cut = pl.ds(n * BLOCK, BLOCK), pl.ds(k * BLOCK, BLOCK)
            scale = jnp.broadcast_to(scale_ref[0, 0, n : n + 1, k : k + 1], (1, BLOCK)).astype(jnp.bfloat16)
            wide_ref[rows, cut] = mxu_codes(w_ref[0, rows, cut], plan.native).astype(jnp.bfloat16) * scale


def _sum_by_blocks(x_ref, w_ref, scale_ref, out_ref, plan: Plan) -> None:
    """FP8 weights straight from their codes, 128 channels at a time."""
    total: Any = 0.0
    for k in range(plan.K // BLOCK):
        cut = pl.ds(k * BLOCK, BLOCK)
        codes = mxu_codes(w_ref[0, :, cut], plan.native)
        part = jax.lax.dot_general(x_ref[0, :, cut], codes, BY_COLUMNS, preferred_element_type=jnp.float32)
        scales = [
            jnp.broadcast_to(scale_ref[0, 0, n : n + 1, k : k + 1], (1, BLOCK))
            for n in range(plan.config.columns // BLOCK)
        ]
        total = total + part * jnp.concatenate(scales, axis=1)
    out_ref[0] = total.astype(out_ref.dtype)


def _kernel(expert_ref, used_ref, x_ref, w_ref, scale_ref, out_ref, *scratch, plan: Plan):
    block = pl.program_id(1)
    used = block < used_ref[0]
    if plan.config.fold:
        before = expert_ref[jnp.maximum(block - 1, 0)]
        (wide_ref,) = scratch
        widen = _widen_packed if plan.packed else _widen_fp8

        @pl.when(used & ((block == 0) | (expert_ref[block] != before)))
        def _widen():
            widen(w_ref, scale_ref, wide_ref, plan)

    @pl.when(used)
    def _multiply():
        if plan.config.fold:
            out = jax.lax.dot_general(x_ref[0], wide_ref[...], BY_COLUMNS, preferred_element_type=jnp.float32)
            out_ref[0] = out.astype(out_ref.dtype)
        elif plan.packed:
            (spread_ref,) = scratch

            def put(columns, sums):
                out_ref[0, :, columns] = jnp.concatenate(sums, axis=0).astype(out_ref.dtype)

            _sum_by_groups(lambda r, cut: x_ref[0, pl.ds(r, 1), cut], w_ref, scale_ref, put, spread_ref, plan)
        else:
            _sum_by_blocks(x_ref, w_ref, scale_ref, out_ref, plan)


def _held_kernel(expert_ref, used_ref, *refs, plan: Plan):
    """`_kernel` of few rows, all of which are held; the first of refs, where there is one more: which of x each is."""
    *row_ref, x_ref, w_ref, scale_ref, out_ref, spread_ref, held_ref, sums_ref = refs
    tile, block = pl.program_id(0), pl.program_id(1)

    @pl.when((block == 0) & ((tile == 0) | (not plan.one_core)))
    def _hold():
        _hold_rows(x_ref, held_ref, plan)

    @pl.when(block < used_ref[0])
    def _multiply():
        def put(columns, sums):
            for r in range(plan.rows):
                sums_ref[pl.ds(block * plan.rows + r, 1), columns] = sums[r]

        own = [block * plan.rows + r for r in range(plan.rows)]
        at = [jnp.minimum(ref[i], x_ref.shape[0] - 1) for ref in row_ref for i in own] or own
        row = lambda r, cut: held_ref[pl.ds(at[r], 1), cut]
        _sum_by_groups(row, w_ref, scale_ref, put, spread_ref, plan)

    @pl.when(block == pl.num_programs(1) - 1)
    def _round():
        out_ref[...] = sums_ref[...].astype(out_ref.dtype)


def _scratch(plan: Plan, x_rows: int) -> list[Any]:
    c = plan.config
    if c.fold:
        return [pltpu.VMEM((c.columns, plan.K), jnp.bfloat16)]
    spread = pltpu.VMEM((plan.rows * GROUPS, plan.K), jnp.bfloat16)
    if plan.held:
        held, sums = (SUBLANES if x_rows == 1 else x_rows, plan.K), (plan.blocks * plan.rows, c.columns)
        return [spread, pltpu.VMEM(held, jnp.float32), pltpu.VMEM(sums, jnp.float32)]
    return [spread] if plan.packed else []


def _call(x, block_expert, blocks_used, w, scale, row=None, *, plan: Plan, chip: Chip, interpret):
    """x [blocks, rows, K] in the kernel's order of columns; scale as stored, or of FP8 [E, tiles, blocks, blocks].

    Where all rows are held, x [n, K] as it is, of which a block has all or those of row; the result is two-dimensional.
    """
    columns = plan.config.columns

    def tile(n, b, expert, used, *_):
        """With no block in use, the grid has one for every tile, which all stay at the first."""
        return expert[b], jnp.where(used[0] > 0, n, 0), 0

    def turned_tile(*at):
        (expert, n, _), each = tile(*at), plan.tiles // plan.stacks
        stack = sum(jnp.int32(n >= i * each) for i in range(1, plan.stacks))  # the profiler knows no division by three
        return expert, stack, 0, n - stack * each

    if not plan.packed:
        scale_spec = pl.BlockSpec((1, 1, *scale.shape[2:]), lambda *at: (*tile(*at), 0))
    elif plan.turned:
        scale_spec = pl.BlockSpec((1, None, scale.shape[2], columns), turned_tile)
    else:
        scale_spec = pl.BlockSpec((1, columns, scale.shape[2]), tile)
    visited = min(plan.blocks, w.shape[0])
    # The grid ends with the blocks in use: the others cost nothing, and hold what memory held.
    known = isinstance(blocks_used, int)
    end = min(max(blocks_used, 1), plan.blocks) if known else jnp.clip(blocks_used, 1, plan.blocks)
    grid = plan.tiles, end
    out_shape: tuple[int, ...] = plan.blocks, plan.rows, plan.N
    if plan.held:
        out_shape = plan.blocks * plan.rows, plan.N
        x_spec = pl.BlockSpec(x.shape, lambda *_: (0, 0))
        out_spec = pl.BlockSpec((out_shape[0], columns), lambda n, *_: (0, n))
    else:
        x_spec = pl.BlockSpec((1, plan.rows, plan.K), lambda n, b, *_: (b, 0, 0))
        out_spec = pl.BlockSpec((1, plan.rows, columns), lambda n, b, *_: (b, 0, n))
    scalars = [block_expert.astype(jnp.int32), jnp.reshape(blocks_used, (1,)).astype(jnp.int32)]
    scalars += [] if row is None else [row.astype(jnp.int32)]
    return pl.pallas_call(
        functools.partial(_held_kernel if plan.held else _kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[x_spec, pl.BlockSpec((1, columns, w.shape[2]), tile), scale_spec],
            out_specs=out_spec,
            scratch_shapes=_scratch(plan, len(x)),
        ),
        out_shape=jax.ShapeDtypeStruct(out_shape, plan.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=int(VMEM_SHARE * chip.vmem_bytes)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size * plan.N,
            bytes_accessed=visited * (w.size // w.shape[0] + scale.size // w.shape[0] * scale.dtype.itemsize)
            + x.size * x.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="expert_matmul",
    )(*scalars, x, w, scale)


def _even_odd(x: jax.Array) -> jax.Array:
    """Columns of each 256: the even ones, then the odd ones.

    By a product with a permutation, which is exact: as a transposition, an axis of 2 would be padded to 128 lanes.
    """
    order = jnp.arange(2 * LANES).reshape(LANES, 2).T.reshape(-1)
    permutation = (jnp.arange(2 * LANES)[:, None] == order).astype(x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    spans = x.reshape(*x.shape[:-1], -1, 2 * LANES)
    return jnp.matmul(spans, permutation, precision=precision).reshape(x.shape)


def _pad_to(x: jax.Array, axis: int, unit: int) -> jax.Array:
    short = -x.shape[axis] % unit
    return jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)]) if short else x


def _turn_scales(scale: jax.Array, plan: Plan) -> jax.Array:
    """[E, N, groups] -> [E, stacks, groups, columns], which is how they lie already."""
    return scale.reshape(len(scale), plan.stacks, -1, scale.shape[2]).swapaxes(2, 3) if plan.turned else scale


def expert_matmul_tpu(
    x: jax.Array,
    block_expert: jax.Array,
    blocks_used: jax.Array | int,
    w: jax.Array,
    scale: jax.Array,
    *,
    row: jax.Array | None = None,
    packed: bool,
    chip: Chip,
    stacks: int = 1,
    config: TpuConfig | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """`reference.expert_matmul` on the TPU `chip`.

    Weights are read where they lie if N is a multiple of 128 and K of 256 (FP8: of 128), as in every published model;
    others are copied to that size first. With no block in use the first block's tile is read all the same.

    Args:
      blocks_used: of known value, an int, it makes the grid a fixed one, which a static profile needs.
      row: as there; rows of a bfloat16 x are read where they lie if blocks have few.
      stacks: of which w and scale were made by a reshape of [E, stacks, N / stacks, ..]; XLA laid out scales so.
      config: block sizes; `tuning.default_config` by default.
      interpret: run on CPU; `pltpu.InterpretParams()` checks memory accesses, too.
    Raises:
      ValueError: the operands disagree, or `chip` is not a TPU.
    """
    require(chip, "expert_matmul_tpu", platform="tpu")
    rows_held = x.dtype == jnp.bfloat16 and packed
    if row is not None and not rows_held:
        x, row = pick_rows(x, row), None
    check_shapes(x, block_expert, blocks_used, w, scale, packed, row)
    blocks, N, dtype = block_expert.shape[0], w.shape[1], x.dtype
    count = x.shape[0] if row is None else row.shape[0]
    if count * x.shape[1] == 0:
        return jnp.zeros((count, N), dtype)
    unit = SPAN if packed else BLOCK
    w = _pad_to(_pad_to(w, 1, LANES), 2, unit // 2 if packed else unit)
    if packed:
        scale = _pad_to(_pad_to(scale, 1, LANES), 2, GROUPS)
    parts = 1 if dtype == jnp.bfloat16 else 3
    plan_rows, K = parts * count // blocks, -(-x.shape[1] // unit) * unit
    if config is None:
        exact = scale.dtype == jnp.uint8
        config = default_config(chip, plan_rows, w.shape[1], K, packed=packed, exact_scales=exact, stacks=stacks)
    nbytes = HELD_BYTES * (x.shape[0] * K + count * config.columns)
    stacks = 1 if N % (stacks * config.columns) else stacks
    plan = Plan(config, plan_rows, blocks, w.shape[1], K, packed, chip.has_fp8_mxu, chip.has_fp4_mxu, dtype, stacks)
    if rows_held and plan.by_group and config.columns > LANES and nbytes <= HELD_SHARE * chip.vmem_bytes:
        plan = dataclasses.replace(plan, held=True, one_core=chip.cores == 1)
        scale = _turn_scales(scale, plan)
        call = functools.partial(_call, plan=plan, chip=chip, interpret=interpret)
        return call(_pad_to(x, 1, unit), block_expert, blocks_used, w, scale, row)[:, :N]
    x = x if row is None else pick_rows(x, row)
    x = (split_fp32(x) if parts > 1 else x[None]).reshape(parts, blocks, count // blocks, -1)
    x = _pad_to(jnp.moveaxis(x, 0, 1), 3, unit).reshape(blocks, plan_rows, K)
    if packed:
        scale = _turn_scales(scale, plan)
        x = x if plan.in_order else _even_odd(x)
        x = x if config.fold else x.astype(jnp.float32)
    else:
        values = scale_value(scale) * jnp.float32(1.0 if plan.native else B11_FACTOR)
        scale = values.reshape(w.shape[0], plan.tiles, -1, values.shape[2])
    out = _call(x, block_expert, blocks_used, w, scale, plan=plan, chip=chip, interpret=interpret)[..., :N]
    if parts > 1:
        out = out.reshape(blocks, parts, -1, N).sum(1)
    return out.reshape(count, N)
