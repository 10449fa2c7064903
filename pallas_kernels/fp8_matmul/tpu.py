"""FP8 products on TPU, by Mosaic: x [rows, channels] times w [columns, channels] transposed, tile by tile.

The grid walks over tiles of rows, of columns and, innermost, of channels; an fp32 sum stays in vector memory. There are
two ways to treat a tile of weights (`TpuConfig.fold`):

* The codes go straight into the matrix unit, 128 channels at a time, and the scale of each 128 x 128 block multiplies
  that part of the sum. v7x takes e4m3fn codes. Earlier units take e4m3b11fnuz, whose exponent is biased by 11 in place
  of 7: the same bits stand for a sixteenth of the value, but for minus zero, which there is NaN and so is cleared.
* Where many rows share a tile and the unit sums over 256 channels, weights are widened to bfloat16 with their scale
  first. Scales that are powers of two make this exact (products below 2^-126 count as zero).

Scales stay as they are stored: the kernel holds all of a weight's and decodes those that a step needs.

Several weights may be multiplied by the same x in one kernel, whose every step takes a tile of each: what has to be
waited for before the first product is waited for once. The grouped form reads, for the columns of a group, the channels
of that group; the inverse rotation is applied to a tile of x as it comes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
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
from pallas_kernels.fp8_matmul.tuning import VMEM_SHARE, TpuConfig, default_config

NO_SIGN, SIGN = 0x7F7F7F7F, -0x7F7F7F80  # of four codes in a word
B11_FACTOR = 16.0  # an e4m3fn value over the e4m3b11fnuz value of the same bits
SCALE_ROWS = 32  # of 8 bits each that fill a register
BY_COLUMNS = (((1,), (1,)), ((), ()))  # contract the last axis of both


@dataclass(frozen=True)
class Plan:
    """What is fixed when the kernel is compiled; sizes are those of the whole operands, channels those of one group.

    columns: of each weight; a tile's columns (`config.columns`) are shared out in proportion.
    """

    config: TpuConfig
    rows: int
    columns: tuple[int, ...]
    channels: int
    groups: int
    head_dim: int  # channels after which the rotation repeats; 0: no rotation
    scaled_rows: bool  # x holds codes with a scale per 128 channels
    native: bool  # the matrix unit takes e4m3fn codes
    out_dtype: Any

    @property
    def grid(self) -> tuple[int, int, int]:
        c = self.config
        return pl.cdiv(self.rows, c.rows), pl.cdiv(sum(self.columns), c.columns), pl.cdiv(self.channels, c.channels)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Columns of each weight in a tile."""
        return tuple(self.config.columns * columns // sum(self.columns) for columns in self.columns)

    @property
    def columns_per_group(self) -> int:
        """Tiles of columns that read the same channels."""
        return max(sum(self.columns) // self.groups // self.config.columns, 1)


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


def _scales(scale_ref, window_ref, columns: int, plan: Plan) -> list[jax.Array]:
    """Of each 128 of a tile's `columns`, fp32 [1, 128]: the scales of the tile's blocks of channels come first."""
    n, k, blocks, held = pl.program_id(1), pl.program_id(2), pl.cdiv(columns, BLOCK), scale_ref.shape[0]
    rows = max(SCALE_ROWS, blocks)
    if held % rows or rows % SCALE_ROWS or rows % blocks:  # the tile's may not lie in one whole register
        rows = held
    start: Any = n * blocks // rows * rows if rows < held else 0
    codes = scale_ref[pl.ds(pl.multiple_of(start, SCALE_ROWS), rows), :] if rows < held else scale_ref[...]
    window_ref[:rows, : scale_ref.shape[1]] = scale_value(codes) * (1.0 if plan.native else B11_FACTOR)
    found = [window_ref[pl.ds(n * blocks - start + i, 1), :] for i in range(blocks)]
    if plan.grid[2] == 1:
        return found
    width = window_ref.shape[1]
    shift = jax.lax.rem(width - k * (plan.config.channels // BLOCK), width)
    return [pltpu.roll(row, shift, 1) for row in found]


def _scale_row(scales: list[jax.Array], columns: int, block: int) -> jax.Array:
    """The scales of a tile's columns at one of its blocks of channels, [1, columns]."""
    parts = [jnp.broadcast_to(row[:, block : block + 1], (1, BLOCK)) for row in scales]
    return jnp.concatenate(parts, axis=1)[:, :columns]


def _sum_by_blocks(scales, x_ref, w_ref, tables, x_scale_ref, plan: Plan) -> jax.Array:
    """fp32 [rows, columns] over the channels of a tile, 128 at a time."""
    total: Any = None
    columns, width = w_ref.shape
    turned = _turned_blocks(x_ref, tables, plan)
    for i, start in enumerate(range(0, width, BLOCK)):
        cut = slice(start, min(start + BLOCK, width))
        x = turned.get(start, x_ref[:, cut])
        if x.dtype == jnp.float8_e4m3fn and not plan.native:
            x = x.astype(jnp.bfloat16)
        part = jax.lax.dot_general(
            x, mxu_codes(w_ref[:, cut], plan.native), BY_COLUMNS, preferred_element_type=jnp.float32
        )
        part *= _scale_row(scales, columns, i)
        if x_scale_ref is not None:
            part *= x_scale_ref[:, i : i + 1]
        total = part if total is None else total + part
    return total


def _sum_at_once(scales, x_ref, w_ref, tables, wide_ref, turned_ref, plan: Plan) -> jax.Array:
    """fp32 [rows, columns] over the channels of a tile, from weights widened with their scale."""
    for n, row in enumerate(scales):
        for k in range(plan.config.channels // BLOCK):
            rows, cut = pl.ds(n * BLOCK, BLOCK), pl.ds(k * BLOCK, BLOCK)
            scale = jnp.broadcast_to(row[:, k : k + 1], (1, BLOCK)).astype(jnp.bfloat16)
            wide_ref[rows, cut] = mxu_codes(w_ref[rows, cut], plan.native).astype(jnp.bfloat16) * scale
    x = x_ref[...]
    if tables:
        turned_ref[...] = x
        for start, turned in _turned_blocks(x_ref, tables, plan).items():
            turned_ref[:, pl.ds(start, BLOCK)] = turned
        x = turned_ref[...]
    wide = wide_ref[: w_ref.shape[0]]
    return jax.lax.dot_general(x, wide, BY_COLUMNS, preferred_element_type=jnp.float32)


def _kernel(x_ref, *refs, plan: Plan):
    rest = list(refs)
    weights = [(rest.pop(0), rest.pop(0)) for _ in plan.columns]
    tables = [rest.pop(0) for _ in range(2 if plan.head_dim else 0)]
    x_scale_ref = rest.pop(0) if plan.scaled_rows else None
    outs = [rest.pop(0) for _ in plan.columns]
    window_ref, acc_ref, *scratch = rest
    first = 0
    for (w_ref, scale_ref), out_ref in zip(weights, outs, strict=True):
        columns = w_ref.shape[0]
        scales = _scales(scale_ref, window_ref, columns, plan)
        if plan.config.fold:
            wide_ref, turned_ref = scratch
            part = _sum_at_once(scales, x_ref, w_ref, tables, wide_ref, turned_ref, plan)
        else:
            part = _sum_by_blocks(scales, x_ref, w_ref, tables, x_scale_ref, plan)
        if plan.grid[2] == 1:
            out_ref[...] = part.astype(out_ref.dtype)
        else:
            _add(part, acc_ref.at[:, pl.ds(first, columns)], out_ref, plan.grid[2])
        first += columns


def _add(part: jax.Array, acc_ref, out_ref, steps: int) -> None:
    """Add a step's sum to those before it; the last step stores."""
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _begin():
        acc_ref[...] = part

    @pl.when(jnp.logical_and(k > 0, k < steps - 1))
    def _more():
        acc_ref[...] += part

    @pl.when(k == steps - 1)
    def _store():
        out_ref[...] = (acc_ref[...] + part).astype(out_ref.dtype)


def _call(x, weights, tables, x_scale, *, plan: Plan, chip: Chip, interpret) -> list[jax.Array]:
    """x [rows, groups * channels], weights of (codes [columns, channels], scales), x_scale [tiles, rows, blocks]."""
    c, steps = plan.config, plan.grid[2]
    x_tile = lambda r, n, k: (r, n // plan.columns_per_group * steps + k if plan.groups > 1 else k)
    in_specs, operands = [pl.BlockSpec((c.rows, c.channels), x_tile)], [x]
    for (codes, scale), columns in zip(weights, plan.tiles, strict=True):
        in_specs.append(pl.BlockSpec((columns, c.channels), lambda r, n, k: (n, k)))
        in_specs.append(pl.BlockSpec(scale.shape, lambda r, n, k: (0, 0)))
        operands += [codes, scale]
    in_specs += [pl.BlockSpec((c.rows, BLOCK), lambda r, n, k: (r, 0)) for _ in tables]
    operands += tables
    if x_scale is not None:
        in_specs.append(pl.BlockSpec((None, c.rows, x_scale.shape[2]), lambda r, n, k: (k, r, 0)))
        operands.append(x_scale)
    outs = [jax.ShapeDtypeStruct((plan.rows, columns), plan.out_dtype) for columns in plan.columns]
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=plan.grid,
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((c.rows, columns), lambda r, n, k: (r, n)) for columns in plan.tiles],
        out_shape=outs,
        scratch_shapes=_scratch([scale for _, scale in weights], bool(tables), plan),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=int(VMEM_SHARE * chip.vmem_bytes),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.rows * sum(plan.columns) * plan.channels,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in [*operands, *outs]),
            transcendentals=0,
        ),
        interpret=interpret,
        name="fp8_matmul" if not plan.head_dim else "fp8_output_projection",
    )(*operands)


def _scratch(scales: list[jax.Array], turns: bool, plan: Plan) -> list:
    """Decoded scales; the sums; where weights are widened, those, and rotated rows."""
    c, (rows, blocks) = plan.config, (max(sizes) for sizes in zip(*(scale.shape for scale in scales), strict=True))
    rows = max(rows, plan.grid[1] * pl.cdiv(max(plan.tiles), BLOCK))  # the last tile need not be full
    scratch = [
        pltpu.VMEM((pl.cdiv(rows, 8) * 8, pl.cdiv(blocks, BLOCK) * BLOCK), jnp.float32),
        pltpu.VMEM((c.rows, c.columns) if plan.grid[2] > 1 else (8, BLOCK), jnp.float32),
    ]
    if c.fold:
        scratch.append(pltpu.VMEM((max(plan.tiles), c.channels), jnp.bfloat16))
        scratch.append(pltpu.VMEM((c.rows, c.channels) if turns else (16, BLOCK), jnp.bfloat16))
    return scratch


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
    options: dict[str, Any] = {"chip": chip, "config": config, "interpret": interpret}
    return fp8_matmuls_tpu(x, [(w, scale)], x_scale=x_scale, out_dtype=out_dtype, **options)[0]


def fp8_matmuls_tpu(
    x,
    weights: Sequence[tuple[jax.Array, jax.Array]],
    *,
    chip: Chip,
    x_scale=None,
    out_dtype=None,
    config: TpuConfig | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> list[jax.Array]:
    """`fp8_matmul_tpu` of the same x with each of several (w, scale): one kernel where all have whole blocks of rows.

    `config.columns` are those of all weights together.
    """
    for w, scale in weights:
        check_shapes(x, w, scale, x_scale)
    require(chip, "fp8_matmul_tpu", platform="tpu")
    options: dict[str, Any] = {"chip": chip, "config": config, "interpret": interpret}
    if len(weights) > 1 and any(w.shape[0] % BLOCK for w, _ in weights):
        options |= {"x_scale": x_scale, "out_dtype": out_dtype}
        return [fp8_matmuls_tpu(x, [weight], **options)[0] for weight in weights]
    dtype = result_dtype(x, out_dtype)
    lead, K = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, K)
    if x.size == 0:
        return [jnp.zeros((*lead, w.shape[0]), dtype) for w, _ in weights]
    if x_scale is not None:
        x_scale = x_scale.reshape(x.shape[0], -1)
        if x_scale.dtype == jnp.uint8:
            x, x_scale = _dequantize_rows(x, x_scale), None
    if x.dtype != jnp.float32:
        outs = _project(x, weights, x_scale=x_scale, out_dtype=dtype, **options)
        return [out.reshape(*lead, -1) for out in outs]
    parts = split_fp32(x)
    outs = _project(parts.reshape(-1, K), weights, out_dtype=jnp.float32, **options)
    return [out.reshape(len(parts), *lead, -1).sum(0).astype(dtype) for out in outs]


def _project(
    x, weights, *, chip: Chip, config, interpret, x_scale=None, out_dtype, groups=1, head_dim=0, tables=()
) -> list[jax.Array]:
    """The kernel for x [rows, groups * channels] and whole groups of each weight's rows."""
    columns, rows, channels = tuple(w.shape[0] for w, _ in weights), x.shape[0], weights[0][0].shape[1]
    exact = x_scale is None and all(scale.dtype == jnp.uint8 for _, scale in weights)
    if config is None:
        config = default_config(
            chip, rows, sum(columns) // groups, channels, exact_scales=exact, unit=math.lcm(BLOCK, head_dim or BLOCK),
            column_unit=sum(columns) // math.gcd(*(n // BLOCK for n in columns)) if len(columns) > 1 else BLOCK,
            groups=groups,
        )  # fmt: skip
    plan = Plan(config, rows, columns, channels, groups, head_dim, x_scale is not None, chip.has_fp8_mxu, out_dtype)
    if x_scale is not None:
        x_scale = x_scale.reshape(rows, plan.grid[2], -1).swapaxes(0, 1)
    return _call(x, weights, tables, x_scale, plan=plan, chip=chip, interpret=interpret)


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
        (out,) = _project(
            o.reshape(B * T, H * D), [(w, scale)], chip=chip, config=config, interpret=interpret,
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
