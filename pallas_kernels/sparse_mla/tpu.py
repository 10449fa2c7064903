"""Sparse MLA on TPU, by Mosaic: one flash-style kernel for decode and prefill.

A tile is some query tokens of one sequence with all their heads: its (token, head) pairs are the rows of every matrix
product, for all heads share the one KV row. A grid step attends with one tile, or, at decode, with the tiles of a few
sequences side by side, so that one's products fill the other's waits. First come, at once, the window rows a tile can
see and its first block of entries, which Pallas's pipeline has brought; then the other blocks of entries that any of
its tokens picked, through two buffers filled by hand. Which entries a token picks is a count, or one bit per entry.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require
from pallas_kernels.kv_rows import Fp8Rows, Rows
from pallas_kernels.mask_bits import WORD, MaskBits, pack_mask
from pallas_kernels.sparse_mla.reference import FirstN, Indices, Mask, Picks, Window, check_shapes
from pallas_kernels.sparse_mla.tpu_attend import ROW_ALIGN, Plan
from pallas_kernels.sparse_mla.tpu_kernel import kernel
from pallas_kernels.sparse_mla.tuning import LANES, MAX_WHOLE_WINDOW, TpuConfig, default_config, gather_is_faster
from pallas_kernels.sparse_mla.xla import cut_band, join_queries, pad_band, split_queries

GATHER_BYTES = 256 << 20  # bound on the rows gathered for one chunk of queries


def _pad(x, axis: int, size: int, value=0):
    """x with `axis` lengthened to `size`."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(
        x, [(0, size - n if i == axis % x.ndim else 0) for i, n in enumerate(x.shape)], constant_values=value
    )


def _tile_bits(words, tokens: int):
    """`MaskBits.words` [B, T, W * 128] -> int32 [B, tiles, W, tokens, 128]."""
    B, T, _ = words.shape
    return jnp.moveaxis(words.reshape(B, T // tokens, tokens, -1, LANES), 3, 2)


def _wanted_blocks(bits, block: int, blocks: int):
    """Bits of tiles -> which blocks of entries any of their tokens picks, bool [B * tiles, blocks]."""
    chunks = math.ceil(block / LANES)  # bits that stand for one block
    words = jax.lax.reduce(bits, np.int32(0), jax.lax.bitwise_or, (3, 4))
    words = words.reshape(-1, words.shape[2])[..., None]
    mask = np.int32((1 << chunks) - 1) if chunks < WORD else np.int32(-1)
    shifts = jnp.broadcast_to(jnp.arange(0, WORD, chunks, dtype=jnp.int32), (*words.shape[:2], -(-WORD // chunks)))
    parts = jax.lax.shift_right_logical(jnp.broadcast_to(words, shifts.shape), shifts) & mask
    return (parts != 0).reshape(words.shape[0], -1)[:, :blocks]


def _mark(index, N: int):
    """int32 [B, T, C] picks -> bool [B, T, N]: two small one-hot factors multiplied, for scatters are slow on TPU."""
    high, low = index >> 7, index & (LANES - 1)  # -1 >> 7 is -1, which no row of `high` has
    groups = math.ceil(N / LANES)
    hot = lambda values, n: (values[..., None] == jnp.arange(n)).astype(jnp.bfloat16)
    counts = jnp.einsum("BTCG,BTCL->BTGL", hot(high, groups), hot(low, LANES), preferred_element_type=jnp.float32)
    return (counts > 0).reshape(*index.shape[:2], -1)[..., :N]


def _follow(active):
    """bool [tiles, blocks] -> int32 [tiles, 1, blocks + 1]: the first active block from each one on, -1 for none."""
    blocks = active.shape[1]
    index = jnp.where(active, jnp.arange(blocks, dtype=jnp.int32), blocks)
    index = jnp.pad(jax.lax.cummin(index, axis=1, reverse=True), ((0, 0), (0, 1)), constant_values=blocks)
    return jnp.where(index == blocks, -1, index)[:, None]


def _leaves(rows: Rows | None) -> list[jax.Array]:
    if isinstance(rows, Fp8Rows):
        return [rows.codes, rows.scales, rows.rope]
    return [] if rows is None else [rows]


def _align_rows(rows: Rows) -> Rows:
    """A pool whose length is no multiple of 32 is copied; the others are read where they lie."""
    return jax.tree.map(lambda x: _pad(x, 1, math.ceil(x.shape[1] / ROW_ALIGN) * ROW_ALIGN), rows)


@dataclass(frozen=True)
class _Specs:
    """What of each operand a grid step reads or writes."""

    plan: Plan

    def _at(self, core, step):
        """Which group of sequences, and which of their tiles."""
        index = jnp.minimum(core * self.plan.steps + step, self.plan.total - 1)
        return jax.lax.div(index, self.plan.tiles), jax.lax.rem(index, self.plan.tiles)

    def tokens(self, *block):
        """Of [sequences, tiles * rows, ...]."""
        return pl.BlockSpec((self.plan.config.sequences, *block), lambda core, step, _: (*self._at(core, step), 0))

    def window(self, part: int, *block, axis: int):
        """Block `part` of those a tile reads of window rows or positions, which vary along `axis`."""
        plan, count = self.plan, self.plan.config.sequences

        def index(core, step, _):
            group, tile = self._at(core, step)
            own = group if plan.share == 1 else jax.lax.div(group * count, plan.share)
            at = jax.lax.div(tile * plan.config.tokens, plan.window_rows) + part if plan.window_parts > 1 else 0
            return own, *((at, 0) if axis == 1 else (0, at))

        return pl.BlockSpec((count if plan.share == 1 else 1, *block), index)

    def entry(self, g: int, width: int):
        """The first block of entries of the g-th sequence."""
        plan = self.plan

        def index(core, step, first):
            group, tile = self._at(core, step)
            sequence = group * plan.config.sequences + g
            return sequence, first[sequence * plan.tiles + tile], 0

        return pl.BlockSpec((None, plan.config.block, width), index)

    def bits(self, words: int):
        block = (self.plan.config.sequences, None, words, self.plan.config.tokens, LANES)
        return pl.BlockSpec(block, lambda core, step, _: (*self._at(core, step), 0, 0, 0))

    def follow(self, width: int):
        """Of [sequences * tiles, 1, width]; several sequences only where each is one tile."""

        def index(core, step, _):
            group, tile = self._at(core, step)
            return group * self.plan.tiles + tile, 0, 0

        return pl.BlockSpec((self.plan.config.sequences, 1, width), index, memory_space=pltpu.SMEM)


def _window_operands(window: Window, T: int, config: TpuConfig):
    """Leaves, positions [B, 1, S], the rows of one block, and how many blocks a tile reads."""
    unit = max(math.ceil(max(window.size - 1, config.tokens) / LANES) * LANES, LANES)
    S = window.rows.shape[1]
    if not window.is_band or S <= 2 * unit:
        return _leaves(window.rows), window.positions[:, None], S, 1
    S = (math.ceil(T / config.tokens) * config.tokens - config.tokens) // unit * unit + 2 * unit
    leaves = [_pad(leaf, 1, max(S, leaf.shape[1])) for leaf in _leaves(window.rows)]
    return leaves, _pad(window.positions, 1, max(S, window.positions.shape[1]), -1)[:, None], unit, 2


def _pick_operands(picks: Picks, T: int, N: int, config: TpuConfig):
    """Counts [B, T], bits or None, and which blocks a tile needs, bool [B * tiles, blocks]; T is padded."""
    blocks, tokens = math.ceil(N / config.block), config.tokens
    if isinstance(picks, FirstN):
        count = _pad(picks.count, 1, T)
        most = count.reshape(-1, tokens).max(1, keepdims=True)
        return count, None, jnp.arange(blocks) * config.block < most
    if not isinstance(picks, MaskBits):
        picks = pack_mask(picks.mask if isinstance(picks, Mask) else _mark(picks.index, N))
    bits = _tile_bits(_pad(picks.words, 1, T), tokens)
    return None, bits, _wanted_blocks(bits, config.block, blocks)


@functools.partial(jax.jit, static_argnames=("scale", "chip", "config", "share", "poisoned", "return_lse", "interpret"))
def _run(q, positions, window, entries, picks, sinks, *, scale, chip, config, share, poisoned, return_lse, interpret):
    """As `sparse_mla_tpu`; `share` consecutive sequences have one window, `poisoned` entries may hold NaN."""
    (B, T, heads, D), H = q.shape, math.ceil(q.shape[2] / 8) * 8
    tiles = math.ceil(T / config.tokens)
    padded, rows = tiles * config.tokens, config.tokens * H
    window_leaves, window_positions, unit, parts = _window_operands(window, T, config)
    if entries is not None and entries.shape[1] > config.block:
        entries = _align_rows(entries)
    pools, N = _leaves(entries), 0 if entries is None else entries.shape[1]
    count, bits, active = _pick_operands(picks, padded, N, config) if N else (None, None, None)
    plan = Plan(
        config, H, B, tiles, min(chip.cores, B // config.sequences * tiles), share, window.size, parts, unit,
        len(window_leaves), N, len(pools), bits is not None, poisoned, chip.has_fp8_mxu, scale,
    )  # fmt: skip
    specs, hbm = _Specs(plan), pl.BlockSpec(memory_space=pltpu.HBM)
    position = _pad(positions, 1, padded, -1)
    bounds = jnp.stack([position, position * 0 if count is None else count], axis=2).astype(jnp.int32)
    sinks = jnp.broadcast_to(_pad(sinks.astype(jnp.float32), 0, H, -jnp.inf)[:, None], (H, LANES))
    q = _pad(_pad(q, 2, H), 1, padded).reshape(B, padded * H, D)
    operands = [
        (bounds, specs.tokens(config.tokens, 2)),
        (sinks, pl.BlockSpec((H, LANES), lambda *_: (0, 0))),
        (q, specs.tokens(rows, D)),
    ]
    for part in range(parts):
        operands += [(leaf, specs.window(part, unit, leaf.shape[2], axis=1)) for leaf in window_leaves]
    operands += [(window_positions, specs.window(part, 1, unit, axis=2)) for part in range(parts)]
    for g in range(config.sequences):
        operands += [(pool, specs.entry(g, pool.shape[2])) for pool in pools[: plan.brought_leaves]]
    first = jnp.zeros((B * tiles,), jnp.int32)
    if plan.blocks > 1:
        follow = _follow(active)
        first = jnp.maximum(follow[:, 0, 0], 0)
        operands.append((follow, specs.follow(follow.shape[2])))
    if bits is not None:
        operands.append((bits, specs.bits(bits.shape[2])))
    operands += [(pool, hbm) for pool in pools if plan.blocks > 1]
    out = [
        (jax.ShapeDtypeStruct((B, padded * H, D), q.dtype), specs.tokens(rows, D)),
        (jax.ShapeDtypeStruct((B, padded * H, 1), jnp.float32), specs.tokens(rows, 1)),
    ][: 2 if return_lse else 1]
    results = pl.pallas_call(
        functools.partial(kernel, plan=plan, with_lse=return_lse),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(plan.cores, plan.steps),
            in_specs=[spec for _, spec in operands],
            out_specs=[spec for _, spec in out],
            scratch_shapes=_scratch(plan, rows, D, pools),
        ),
        out_shape=[shape for shape, _ in out],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=chip.vmem_bytes // 2
        ),
        cost_estimate=_cost(plan, q, [*window_leaves, *pools], out),
        interpret=interpret,
        name="sparse_mla",
    )(first, *[array for array, _ in operands])
    values, *lse = (x.reshape(B, padded, H, -1)[:, :T, :heads] for x in results)
    return (values, lse[0][..., 0]) if return_lse else values


def _cost(plan: Plan, q, rows, out) -> pl.CostEstimate:
    """The most there may be to do: every row of both pools is read once for each sequence and meets each query."""
    window = plan.window_parts * plan.window_rows
    scores = q.shape[0] * q.shape[1] * (window + plan.entries)
    moved = [q, *rows, *(shape for shape, _ in out)]
    return pl.CostEstimate(
        flops=4 * scores * q.shape[2],
        transcendentals=scores,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
    )


def _scratch(plan: Plan, rows: int, D: int, pools) -> list[Any]:
    G, tokens, block = plan.config.sequences, plan.config.tokens, plan.config.block
    streams = plan.blocks > 1
    shapes: list[Any] = [pltpu.VMEM((G, rows, width), jnp.float32) for width in (LANES, LANES, D) if streams]
    widths = (plan.window_parts * plan.window_rows, block) if pools else (plan.window_parts * plan.window_rows,)
    if plan.holds_bias:
        shapes += [pltpu.VMEM((G, tokens, width), jnp.float32) for width in widths]
    if streams:
        shapes.append(pltpu.SemaphoreType.DMA((G, 2, len(pools))))
        shapes += [pltpu.VMEM((G, 2, block, pool.shape[2]), pool.dtype) for pool in pools]
    return shapes


def _gather(rows: Rows, index) -> Rows:
    """Rows [B, N, D] picked by int32 [B, T, C] (-1 brings the first row) -> [B * T, C, D]."""
    B, N = rows.shape[:2]
    index = jnp.maximum(index, 0)
    if N % ROW_ALIGN:  # joining sequences would copy the pool
        picked = jax.tree.map(lambda x: jax.vmap(lambda row, i: row.at[i].get(mode="clip"))(x, index), rows)
    else:
        flat = (index + N * jnp.arange(B, dtype=jnp.int32)[:, None, None]).reshape(-1)
        picked = jax.tree.map(lambda x: x.reshape(B * N, -1).at[flat].get(mode="clip"), rows)
    return jax.tree.map(lambda x: x.reshape(B * index.shape[1], index.shape[2], -1), picked)


@functools.partial(jax.jit, static_argnames=("scale", "chip", "config", "return_lse", "interpret"))
def _run_gathered(q, positions, window, entries, picks, sinks, *, config, **static):
    """As `sparse_mla_tpu`, for `Indices`: every query becomes a sequence of its own with the rows it picked."""
    B, T, H, D = q.shape
    C = picks.index.shape[2]
    chunk = max(1, min(T, GATHER_BYTES // (B * C * D * q.dtype.itemsize)))

    def attend(q, positions, window, index):
        queries = index.shape[1]
        alone = lambda x: x.reshape(B * queries, 1, *x.shape[2:])
        own = config or default_config(static["chip"], queries if queries > 1 else B, 1, math.ceil(H / 8) * 8, C)
        rows = Window(window.rows, window.positions, window.size)
        args = alone(q), alone(positions), rows, _gather(entries, index), Mask(alone(index >= 0)), sinks
        out = _run(*args, config=own, share=queries, poisoned=True, **static)
        return jax.tree.map(lambda x: x.reshape(B, queries, *x.shape[2:]), out)

    if chunk == T:
        return attend(q, positions, window, picks.index)
    blocks = jax.tree.map(lambda x: split_queries(x, chunk), (q, positions, picks.index))
    padded = pad_band(window, -T % chunk)

    def step(args):
        q, positions, index, first = args
        return attend(q, positions, cut_band(padded, first, chunk), index)

    out = jax.lax.map(step, (*blocks, jnp.arange(blocks[0].shape[0]) * chunk))
    return jax.tree.map(lambda x: join_queries(x, T), out)


def sparse_mla_tpu(
    q: jax.Array,
    positions: jax.Array,
    window: Window,
    entries: Rows | None,
    picks: Picks | None,
    sinks: jax.Array,
    *,
    scale: float,
    chip: Chip,
    config: TpuConfig | None = None,
    return_lse: bool = False,
    interpret: bool | pltpu.InterpretParams = False,
):
    """See `reference.sparse_mla`.

    A pool of entries whose length is a multiple of 32 (or at most one block) is read where it lies; others are copied.
    `Indices` become a mask over all entries, of which blocks that nobody picked are skipped, or, where the pool is so
    long that this costs more, XLA gathers the rows first.

    Args:
      chip: what to compile for; its figures choose the block sizes. Nothing is asked of the device.
      config: block sizes other than `tuning.default_config`'s.
      interpret: run on CPU.
    Raises:
      ValueError: the shapes disagree, `chip` is no TPU, or the window is too long to be read whole.
    """
    require(chip, "sparse_mla", platform="tpu")
    check_shapes(q, positions, window, entries, picks, sinks)
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"sparse_mla: q is {q.dtype}; the TPU kernel takes bfloat16 or float32")
    if not window.is_band and window.rows.shape[1] > MAX_WHOLE_WINDOW:
        raise ValueError(
            f"sparse_mla: a window of {window.rows.shape[1]} rows is too long to be read whole (at most "
            f"{MAX_WHOLE_WINDOW}); give the rows in order, with is_band=True"
        )
    B, T, heads, D = q.shape
    H = math.ceil(heads / 8) * 8
    N = 0 if entries is None else entries.shape[1]
    static = {"scale": scale, "chip": chip, "return_lse": return_lse, "interpret": interpret}
    if isinstance(picks, Indices) and gather_is_faster(chip, T, H, D, N, picks.index.shape[2]):
        return _run_gathered(q, positions, window, entries, picks, sinks, config=config, **static)
    config = config or default_config(chip, B, T, H, N)
    poisoned = isinstance(picks, Indices)
    return _run(q, positions, window, entries, picks, sinks, config=config, share=1, poisoned=poisoned, **static)
