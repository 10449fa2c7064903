"""FP8 products on TPU, by Mosaic: x [rows, channels] times w [columns, channels] transposed, tile by tile.

The grid walks over tiles of rows, of columns and, innermost, of channels; an fp32 sum stays in vector memory. There are
two ways to treat a tile of weights (`TpuConfig.fold`):

* The codes go straight into the matrix unit, 128 channels at a time, and the scale of each 128 x 128 block multiplies
  that part of the sum. v7x takes e4m3fn codes. Earlier units take e4m3b11fnuz, whose exponent is biased by 11 in place
  of 7: the same bits stand for a sixteenth of the value, but for minus zero, which there is NaN and so is cleared.
* Where many rows share a tile and the unit sums over 256 channels, weights are widened to bfloat16 with their scale
  first. Scales that are powers of two make this exact (products below 2^-126 count as zero).

The grouped form reads, for the columns of a group, the channels of that group; the inverse rotation is applied to a
tile of x as it comes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.formats import decode_e4m3
from pallas_kernels.fp8_matmul.reference import (
    BLOCK,
    block_rows,
    check_groups,
    check_shapes,
    inverse_rope,
    result_dtype,
    scale_value,
)
from pallas_kernels.fp8_matmul.tuning import TpuConfig, default_config

NO_SIGN, SIGN = 0x7F7F7F7F, -0x7F7F7F80  # of four codes in a word
B11_FACTOR = 16.0  # an e4m3fn value over the e4m3b11fnuz value of the same bits
VMEM_SHARE = 0.5  # of the vector memory that a kernel may plan with
BY_COLUMNS = (((1,), (1,)), ((), ()))  # contract the last axis of both


@dataclass(frozen=True)
class Plan:
    """What is fixed when the kernel is compiled; sizes are those of the whole operands, channels those of one group."""

    config: TpuConfig
    rows: int
    columns: int
    channels: int
    groups: int
    head_dim: int  # channels after which the rotation repeats; 0: no rotation
    scaled_rows: bool  # x holds codes with a scale per 128 channels
    native: bool  # the matrix unit takes e4m3fn codes
    out_dtype: Any

    @property
    def grid(self) -> tuple[int, int, int]:
        c = self.config
        return pl.cdiv(self.rows, c.rows), pl.cdiv(self.columns, c.columns), pl.cdiv(self.channels, c.channels)

    @property
    def column_blocks(self) -> range:
        """Scaling blocks in a tile's columns."""
        return range(pl.cdiv(self.config.columns, BLOCK))

    @property
    def columns_per_group(self) -> int:
        """Tiles of columns that read the same channels."""
        return max(self.columns // self.groups // self.config.columns, 1)


def mxu_codes(codes: jax.Array, native: bool) -> jax.Array:
    """Codes as the matrix unit takes them: themselves, or e4m3b11fnuz with a sixteenth of their value."""
    if native:
        return codes
    words = pltpu.bitcast(codes, jnp.int32)
    # Adding 127 to the seven low bits of a byte carries into its sign bit unless they are all zero.
    keep = ((words & NO_SIGN) + NO_SIGN) | NO_SIGN
    return pltpu.bitcast(words & keep, jnp.float8_e4m3b11fnuz)


def rotate_back(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """128 channels of a head, [rows, 128]; cos is 1 and sin 0 where they stay, sin negative at odd channels."""
    wide = x.astype(jnp.float32)
    lane = jax.lax.broadcasted_iota(jnp.int32, wide.shape, 1)
    partner = jnp.where(lane % 2 == 0, pltpu.roll(wide, BLOCK - 1, 1), pltpu.roll(wide, 1, 1))
    return (wide * cos + partner * sin).astype(x.dtype)


def _turned_blocks(x_ref, tables, plan: Plan) -> dict[int, jax.Array]:
    """{first channel: the last 128 channels of a head, turned}, for all heads of a tile."""
    if not tables:
        return {}
    own, partner = (table[...] for table in tables)
    starts = [stop - BLOCK for stop in range(plan.head_dim, plan.config.channels + 1, plan.head_dim)]
    return {start: rotate_back(x_ref[:, start : start + BLOCK], own, partner) for start in starts}


def _scale_row(scale_ref, plan: Plan, block: int) -> jax.Array:
    """The scales of a tile's columns at one of its blocks of channels, [1, columns]."""
    scales = [jnp.broadcast_to(scale_ref[0, 0, i : i + 1, block : block + 1], (1, BLOCK)) for i in plan.column_blocks]
    return jnp.concatenate(scales, axis=1)[:, : plan.config.columns]


def _sum_by_blocks(scale_ref, x_ref, w_ref, tables, x_scale_ref, plan: Plan) -> jax.Array:
    """fp32 [rows, columns] over the channels of a tile, 128 at a time."""
    total: Any = None
    width = plan.config.channels
    turned = _turned_blocks(x_ref, tables, plan)
    for i, start in enumerate(range(0, width, BLOCK)):
        cut = slice(start, min(start + BLOCK, width))
        x = turned.get(start, x_ref[:, cut])
        if x.dtype == jnp.float8_e4m3fn and not plan.native:
            x = x.astype(jnp.bfloat16)
        part = jax.lax.dot_general(
            x, mxu_codes(w_ref[:, cut], plan.native), BY_COLUMNS, preferred_element_type=jnp.float32
        )
        part *= _scale_row(scale_ref, plan, i)
        if x_scale_ref is not None:
            part *= x_scale_ref[:, i : i + 1]
        total = part if total is None else total + part
    return total


def _sum_at_once(scale_ref, x_ref, w_ref, tables, wide_ref, turned_ref, plan: Plan) -> jax.Array:
    """fp32 [rows, columns] over the channels of a tile, from weights widened with their scale."""
    c = plan.config
    for n in plan.column_blocks:
        for k in range(c.channels // BLOCK):
            rows, cut = pl.ds(n * BLOCK, BLOCK), pl.ds(k * BLOCK, BLOCK)
            scale = jnp.broadcast_to(scale_ref[0, 0, n : n + 1, k : k + 1], (1, BLOCK)).astype(jnp.bfloat16)
            wide_ref[rows, cut] = mxu_codes(w_ref[rows, cut], plan.native).astype(jnp.bfloat16) * scale
    x = x_ref[...]
    if tables:
        turned_ref[...] = x
        for start, turned in _turned_blocks(x_ref, tables, plan).items():
            turned_ref[:, pl.ds(start, BLOCK)] = turned
        x = turned_ref[...]
    return jax.lax.dot_general(x, wide_ref[...], BY_COLUMNS, preferred_element_type=jnp.float32)


def _kernel(scale_ref, x_ref, w_ref, *refs, plan: Plan):
    rest = list(refs)
    tables = [rest.pop(0) for _ in range(2 if plan.head_dim else 0)]
    x_scale_ref = rest.pop(0) if plan.scaled_rows else None
    out_ref, acc_ref, *scratch = rest
    k, steps = pl.program_id(2), plan.grid[2]
    if plan.config.fold:
        wide_ref, turned_ref = scratch
        part = _sum_at_once(scale_ref, x_ref, w_ref, tables, wide_ref, turned_ref, plan)
    else:
        part = _sum_by_blocks(scale_ref, x_ref, w_ref, tables, x_scale_ref, plan)
    if steps == 1:
        out_ref[...] = part.astype(out_ref.dtype)
        return

    @pl.when(k == 0)
    def _begin():
        acc_ref[...] = part

    @pl.when(jnp.logical_and(k > 0, k < steps - 1))
    def _add():
        acc_ref[...] += part

    @pl.when(k == steps - 1)
    def _store():
        out_ref[...] = (acc_ref[...] + part).astype(out_ref.dtype)


def _tiles_of_scale(scale: jax.Array, plan: Plan) -> jax.Array:
    """fp32 [columns / 128, channels / 128] -> the blocks of each tile, [tiles, tiles, blocks, blocks]."""
    (_, n, k), c = plan.grid, plan.config
    columns, channels = len(plan.column_blocks), pl.cdiv(c.channels, BLOCK)
    scale = jnp.pad(scale, ((0, n * columns - scale.shape[0]), (0, k * channels - scale.shape[1])))
    return scale.reshape(n, columns, k, channels).transpose(0, 2, 1, 3)


def _call(x, w, scale, tables, x_scale, *, plan: Plan, chip: Chip, interpret):
    """x [rows, groups * channels], w [columns, channels], scale of `_tiles_of_scale`, x_scale [tiles, rows, blocks]."""
    c, steps = plan.config, plan.grid[2]
    x_tile = lambda r, n, k: (r, n // plan.columns_per_group * steps + k if plan.groups > 1 else k)
    in_specs = [
        pl.BlockSpec((1, 1, *scale.shape[2:]), lambda r, n, k: (n, k, 0, 0)),
        pl.BlockSpec((c.rows, c.channels), x_tile),
        pl.BlockSpec((c.columns, c.channels), lambda r, n, k: (n, k)),
        *(pl.BlockSpec((c.rows, BLOCK), lambda r, n, k: (r, 0)) for _ in tables),
    ]
    operands = [scale, x, w, *tables]
    if x_scale is not None:
        in_specs.append(pl.BlockSpec((None, c.rows, x_scale.shape[2]), lambda r, n, k: (k, r, 0)))
        operands.append(x_scale)
    scratch = [pltpu.VMEM((c.rows, c.columns) if steps > 1 else (8, BLOCK), jnp.float32)]
    if c.fold:
        scratch.append(pltpu.VMEM((c.columns, c.channels), jnp.bfloat16))
        scratch.append(pltpu.VMEM((c.rows, c.channels) if tables else (16, BLOCK), jnp.bfloat16))
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=plan.grid,
        in_specs=in_specs,
        out_specs=pl.BlockSpec((c.rows, c.columns), lambda r, n, k: (r, n)),
        out_shape=jax.ShapeDtypeStruct((plan.rows, plan.columns), plan.out_dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=int(VMEM_SHARE * chip.vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.rows * plan.columns * plan.channels,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in operands)
            + plan.rows * plan.columns * jnp.dtype(plan.out_dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="fp8_matmul" if not plan.head_dim else "fp8_output_projection",
    )(*operands)


def split_fp32(x: jax.Array) -> jax.Array:
    """fp32 [rows, K] -> bfloat16 [3, rows, K], three parts that add up to it exactly."""
    parts = []
    for _ in range(3):
        part = x.astype(jnp.bfloat16)
        parts.append(part)
        x = x - part.astype(jnp.float32)
    return jnp.stack(parts)


def _dequantize_rows(x: jax.Array, x_scale: jax.Array) -> jax.Array:
    """Codes [rows, K] with power-of-two scales [rows, ceil(K / 128)] -> bfloat16, exactly."""
    factors = jnp.repeat(scale_value(x_scale), BLOCK, axis=1)[:, : x.shape[1]]
    return (decode_e4m3(x) * factors).astype(jnp.bfloat16)


def fp8_matmul_tpu(
    x,
    w,
    scale,
    *,
    chip: Chip,
    x_scale=None,
    out_dtype=None,
    config: TpuConfig | None = None,
    interpret: bool | pltpu.InterpretParams = False,
):
    """`reference.fp8_matmul` on the TPU `chip`.

    Codes whose scales are powers of two are widened first, which is exact; codes with other scales are multiplied as
    they are. float32 x is multiplied in three exact bfloat16 parts.

    Args:
      config: block sizes; `tuning.default_config` by default.
      interpret: run on CPU; `pltpu.InterpretParams()` checks memory accesses, too.
    Raises:
      ValueError: the operands disagree, or `chip` is not a TPU.
    """
    check_shapes(x, w, scale, x_scale)
    require(chip, "fp8_matmul_tpu", platform="tpu")
    dtype = result_dtype(x, out_dtype)
    lead, K = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, K)
    if x.size == 0:
        return jnp.zeros((*lead, w.shape[0]), dtype)
    if x_scale is not None:
        x_scale = x_scale.reshape(x.shape[0], -1)
        if x_scale.dtype == jnp.uint8:
            x, x_scale = _dequantize_rows(x, x_scale), None
    parts = 3 if x.dtype == jnp.float32 else 1
    run = functools.partial(_project, w=w, scale=scale, chip=chip, config=config, interpret=interpret)
    if parts == 1:
        return run(x, x_scale=x_scale, out_dtype=dtype).reshape(*lead, -1)
    out = run(split_fp32(x).reshape(-1, K), x_scale=None, out_dtype=jnp.float32)
    return out.reshape(parts, *lead, -1).sum(0).astype(dtype)


def _project(x, w, scale, *, chip: Chip, config, interpret, x_scale=None, out_dtype, groups=1, head_dim=0, tables=()):
    """The kernel for x [rows, groups * channels] and whole groups of w's rows."""
    (columns, channels), rows = w.shape, x.shape[0]
    exact = scale.dtype == jnp.uint8 and x_scale is None
    if config is None:
        unit = math.lcm(BLOCK, head_dim or BLOCK)
        config = default_config(chip, rows, columns // groups, channels, exact_scales=exact, unit=unit, groups=groups)
    native = chip.has_fp8_mxu
    factor = jnp.float32(1.0 if native else B11_FACTOR)
    plan = Plan(config, rows, columns, channels, groups, head_dim, x_scale is not None, native, out_dtype)
    scale = _tiles_of_scale(scale_value(scale) * factor, plan)
    if x_scale is not None:
        x_scale = x_scale.reshape(rows, plan.grid[2], -1).swapaxes(0, 1)
    return _call(x, w, scale, tables, x_scale, plan=plan, chip=chip, interpret=interpret)


def rotation_tables(cos, sin) -> tuple[jax.Array, jax.Array]:
    """cos, sin [rows, R / 2] -> the factors of a channel itself and of its partner in `rotate_back`, [rows, 128]."""
    still = BLOCK - 2 * cos.shape[-1]
    signs = jnp.tile(jnp.asarray([1.0, -1.0], jnp.float32), cos.shape[-1])
    own = jnp.pad(jnp.repeat(cos, 2, axis=-1), ((0, 0), (still, 0)), constant_values=1.0)
    partner = jnp.pad(jnp.repeat(sin, 2, axis=-1) * signs, ((0, 0), (still, 0)))
    return own, partner


def grouped_output_projection_tpu(
    o,
    cos,
    sin,
    w,
    scale,
    *,
    groups: int,
    chip: Chip,
    config: TpuConfig | None = None,
    interpret: bool | pltpu.InterpretParams = False,
):
    """`reference.grouped_output_projection` on the TPU `chip`: one kernel where groups are made of whole blocks.

    Otherwise (fewer than 128 rows of w a group, heads that are not made of 128 channels, float32) the rotation comes
    first and each group is a product of its own. Arguments as in `fp8_matmul_tpu`.
    """
    check_groups(o, cos, sin, w, scale, groups)
    require(chip, "grouped_output_projection_tpu", platform="tpu")
    (B, T, H, D), rows = o.shape, w.shape[0] // groups
    whole = D % BLOCK == 0 and 2 * cos.shape[-1] <= BLOCK and (groups == 1 or rows % BLOCK == 0)
    if whole and o.dtype == jnp.bfloat16 and o.size:
        tables = rotation_tables(*(t.astype(jnp.float32).reshape(B * T, -1) for t in (cos, sin)))
        out = _project(
            o.reshape(B * T, H * D), w, scale, chip=chip, config=config, interpret=interpret,
            out_dtype=o.dtype, groups=groups, head_dim=D, tables=tables,
        )  # fmt: skip
        return out.reshape(B, T, -1)
    x = inverse_rope(o, cos, sin).reshape(B, T, groups, -1)
    parts = []
    for g in range(groups):
        held, wanted = block_rows(g, rows)
        blocks = slice(held.start // BLOCK, held.stop // BLOCK)
        part = fp8_matmul_tpu(x[:, :, g], w[held], scale[blocks], chip=chip, config=config, interpret=interpret)
        parts.append(part[..., wanted])
    return jnp.concatenate(parts, axis=-1)
