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
from pallas_kernels.fp8_matmul.tpu import B11_FACTOR, mxu_codes
from pallas_kernels.kv_rows import GROUP, Fp8Rows, Rows
from pallas_kernels.mask_bits import WORD, MaskBits, pack_mask
from pallas_kernels.sparse_mla.reference import FirstN, Indices, Mask, Picks, Window, check_shapes
from pallas_kernels.sparse_mla.tuning import LANES, MAX_WHOLE_WINDOW, TpuConfig, default_config, gather_is_faster
from pallas_kernels.sparse_mla.xla import cut_band, join_queries, pad_band, split_queries

LOG2E = math.log2(math.e)
HIDDEN = -2e30  # added to the logit of a row that is not picked
LOWEST = -1e29  # least running maximum: above HIDDEN by so much that hidden rows weigh exactly nothing
B11_SHIFT = int(math.log2(B11_FACTOR))
ROW_ALIGN = 32  # rows of an 8-bit array that lie in one tile of memory
AHEAD = 2  # pieces of work whose scores are computed early
MAX_EXPONENT = 246  # of an e8m0 scale: the largest that no e4m3 code takes past what bfloat16 holds
GATHER_BYTES = 256 << 20  # bound on the rows gathered for one chunk of queries


@dataclass(frozen=True)
class Plan:
    """What is fixed when the kernel is compiled."""

    config: TpuConfig
    heads: int
    sequences: int
    tiles: int  # of one sequence
    cores: int
    share: int  # consecutive sequences that have one window
    window_size: int
    window_parts: int  # blocks of window rows that one tile reads
    window_rows: int  # of one of them
    window_leaves: int  # arrays that make up KV rows: 1, or 3 in 8 bits
    entries: int  # rows of the entry pool, 0 for none
    entry_leaves: int
    by_bits: bool
    poisoned: bool  # entries nobody picks may hold NaN
    native: bool  # e4m3fn codes need no other form to become wide
    scale: float

    @property
    def total(self) -> int:
        """Grid steps that have work."""
        return self.sequences // self.config.sequences * self.tiles

    @property
    def steps(self) -> int:
        """Grid steps of one core."""
        return math.ceil(self.total / self.cores)

    @property
    def holds_bias(self) -> bool:
        return self.config.tokens > 1

    @property
    def blocks(self) -> int:
        return math.ceil(self.entries / max(self.config.block, 1))

    @property
    def fetches_all(self) -> bool:
        """A lone step of several blocks copies them all itself: its window needs no entries to have come."""
        return self.blocks > 1 and self.steps == 1

    @property
    def brought_leaves(self) -> int:
        """Arrays of entries whose first block Pallas's pipeline brings."""
        return 0 if self.fetches_all else self.entry_leaves


def _finite(rows):
    """0 in place of NaN and infinities."""
    wide = rows.astype(jnp.float32)
    return jnp.where(jnp.abs(wide) < jnp.inf, wide, 0.0).astype(rows.dtype)


def _widen(leaves, dtype, native: bool, poisoned: bool = False):
    """KV rows in `dtype` from the refs that hold them: one of values, or codes, scales and rotary channels.

    poisoned: NaN, infinities and scales that no finite row has become zeros.
    """
    cleaned = _finite if poisoned else lambda rows: rows
    if len(leaves) == 1:
        return cleaned(leaves[0][...].astype(dtype))
    codes, scales, rope = (leaf[...] for leaf in leaves)
    exponent = scales.astype(jnp.int32)
    exponent = jnp.where(exponent > MAX_EXPONENT, 0, exponent) if poisoned else exponent
    by_bits = not native and codes.shape[0] % ROW_ALIGN == 0  # a ring with room for drafts is no whole number of tiles
    exponent = jnp.minimum(exponent + B11_SHIFT, 255) if by_bits else exponent
    factor = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32).astype(jnp.bfloat16)
    shape = (scales.shape[1], codes.shape[1])
    group = jax.lax.broadcasted_iota(jnp.int32, shape, 1) // GROUP == jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    # One factor per group of lanes: the matrix unit spreads powers of two exactly.
    spread = _product(factor, group.astype(jnp.bfloat16), transposed=False).astype(jnp.bfloat16)
    # The bits of e4m3fn's NaN are a number in the other form.
    wide = mxu_codes(codes, False) if by_bits else cleaned(codes.astype(jnp.float32))
    wide = wide.astype(jnp.bfloat16) * spread
    return jnp.concatenate([wide.astype(dtype), cleaned(rope).astype(dtype)], axis=1)


def _product(a, b, *, transposed: bool):
    """a @ b or a @ b.T, accumulated in fp32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _lane_chunks(x):
    return [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]


def _lane_sums(chunks):
    """Sums over chunks, still one per lane; a narrow last chunk is summed into lane 0."""
    total = sum(chunk for chunk in chunks if chunk.shape[1] == LANES)
    for chunk in chunks:
        if chunk.shape[1] != LANES:
            total = total + _in_lane_0(chunk.sum(axis=1, keepdims=True))
    return total


def _in_lane_0(x):
    lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
    return jnp.where(lane == 0, x, 0.0)


def _row_max(chunks):
    full = [chunk for chunk in chunks if chunk.shape[1] == LANES]
    narrow = [chunk.max(axis=1, keepdims=True) for chunk in chunks if chunk.shape[1] != LANES]
    if full:
        narrow.append(functools.reduce(jnp.maximum, full).max(axis=1, keepdims=True))
    return functools.reduce(jnp.maximum, narrow)


def _logits(q, rows, bias, nan: bool, plan: Plan):
    """Scores in base 2 of query rows [tokens * H, D] and KV rows [S, D], under bias [tokens, S], by 128 columns."""
    scores, H = _product(q, rows, transposed=True) * (plan.scale * LOG2E), plan.heads
    parts = []
    for t in range(bias.shape[0]):
        part, hide = scores[t * H : (t + 1) * H], bias[t : t + 1]
        parts.append(jnp.where(hide < 0, HIDDEN, part) if nan else part + hide)
    return _lane_chunks(jnp.concatenate(parts, axis=0))


def _attend(plan: Plan, q_ref, sinks_ref, state, pools):
    """Jobs, one per piece of a tile: a step of the running softmax over `pools` (KV rows [S, D], bias [tokens, S],
    scores may be NaN, None or whether there are rows at all). A job is a generator: it yields None after its scores,
    then (query rows, (peak, total, output)).

    state: what the steps before left, or None.
    """
    count = plan.config.rows // plan.heads
    for token in range(0, plan.config.tokens, count):
        yield _attend_piece(plan, q_ref, sinks_ref, state, pools, token, count)


def _attend_piece(plan: Plan, q_ref, sinks_ref, state, pools, token: int, count: int):
    here = pl.ds(token * plan.heads, plan.config.rows)
    logits = [_logits(q_ref[here], rows, bias[token : token + count], nan, plan) for rows, bias, nan, _ in pools]
    yield None
    sink = jnp.concatenate([sinks_ref[...] * LOG2E] * count, axis=0)
    before = jnp.maximum(sink, LOWEST) if state is None else state[0][here]
    peak = jnp.maximum(before, _row_max(sum(logits, [])))
    weights = [[jnp.exp2(x - peak[:, : x.shape[1]]) for x in part] for part in logits]
    total = _lane_sums(sum(weights, []))
    parts = []
    for w, (rows, _, _, filled) in zip(weights, pools, strict=True):
        part = _product(jnp.concatenate(w, axis=1).astype(rows.dtype), rows, transposed=False)
        parts.append(part if filled is None else jnp.where(filled, part, 0.0))
    out = functools.reduce(jnp.add, parts)
    if state is None:
        total = total + _in_lane_0(jnp.exp2(sink - peak))
    else:
        keep, D = jnp.exp2(before - peak), out.shape[1]
        total = total + state[1][here] * keep
        out = out + state[2][here] * jnp.concatenate([keep] * math.ceil(D / LANES), axis=1)[:, :D]
    yield here, (peak, total, out)


def _interleave(jobs, store):
    """Run jobs [(sequence, job)] so that the scores of the next AHEAD come before the softmax of one.

    The compiler keeps the order of loads and stores it cannot tell apart, so the order written is the overlap we get.
    """
    scored: list[Any] = []
    for job in [*jobs, *[None] * AHEAD]:
        scored.append(job)
        if job is not None:
            next(job[1])
        if len(scored) > AHEAD:
            done = scored.pop(0)
            if done is not None:
                store(done[0], *next(done[1]))


def _window_bias(positions, query, size: int):
    seen = (positions >= 0) & (positions <= query) & (positions > query - size)
    return jnp.where(seen, 0.0, HIDDEN)


def _entry_bias(plan: Plan, block, bounds_ref, bits_ref):
    """fp32 [tokens, block rows]: 0 for an entry that is picked."""
    tokens, width = plan.config.tokens, plan.config.block
    if not plan.by_bits:
        column = jax.lax.broadcasted_iota(jnp.int32, (tokens, width), 1) + block * width
        return jnp.where(column < bounds_ref[:, 1:2], 0.0, HIDDEN)
    words_per_block = math.ceil(width / LANES)
    blocks_per_word = 32 // words_per_block
    words = bits_ref[block // blocks_per_word]
    shift = block % blocks_per_word * words_per_block
    bits = [jax.lax.shift_right_logical(words, shift + c) & 1 for c in range(words_per_block)]
    return jnp.where(jnp.concatenate(bits, axis=1)[:, :width] > 0, 0.0, HIDDEN)


def _copy(plan: Plan, pools, buffers, sems, sequence, block, slot, act):
    """Start or await the copy of one block of entries; the last block may be short."""
    width, rest = plan.config.block, plan.entries % plan.config.block

    def copy(size):
        start = pl.multiple_of(block * width, width)
        for i, (pool, buffer) in enumerate(zip(pools, buffers, strict=True)):
            source = pool.at[sequence, pl.ds(start, size)]
            act(pltpu.make_async_copy(source, buffer.at[slot, pl.ds(0, size)], sems.at[slot, i]))

    if not rest:
        copy(width)
    else:
        last = block == plan.blocks - 1
        pl.when(last)(lambda: copy(rest))
        pl.when(~last)(lambda: copy(width))


@dataclass
class _Refs:
    """The kernel's operands, outputs and scratch; a list has one item per sequence of the step."""

    first: Any
    bounds: Any
    sinks: Any
    q: Any
    window: list[Any]  # leaves of each part
    window_positions: list[Any]
    entry: list[Any]  # leaves of each sequence's first block
    follow: Any
    bits: Any
    pools: list[Any]
    out: Any
    lse: Any
    state: list[Any]
    window_bias: Any
    entry_bias: Any
    sems: Any
    buffers: list[Any]

    @classmethod
    def of(cls, plan: Plan, with_lse: bool, refs):
        queue = list(refs)
        take = lambda n: [queue.pop(0) for _ in range(n)]
        one = lambda present=True: queue.pop(0) if present else None
        streams = plan.blocks > 1
        return cls(
            first=one(), bounds=one(), sinks=one(), q=one(),
            window=[take(plan.window_leaves) for _ in range(plan.window_parts)],
            window_positions=take(plan.window_parts),
            entry=[take(plan.brought_leaves) for _ in range(plan.config.sequences)],
            follow=one(streams), bits=one(plan.by_bits), pools=take(plan.entry_leaves if streams else 0),
            out=one(), lse=one(with_lse), state=take(3 if streams else 0), window_bias=one(plan.holds_bias),
            entry_bias=one(plan.holds_bias and plan.entries > 0), sems=one(streams),
            buffers=take(plan.entry_leaves if streams else 0),
        )  # fmt: skip


def _kernel(*refs, plan: Plan, with_lse: bool):
    step = pl.program_id(1)
    index = pl.program_id(0) * plan.steps + step
    r = _Refs.of(plan, with_lse, refs)

    @pl.when(index < plan.total)
    def _step():
        sequences = range(plan.config.sequences)
        sequence = [jax.lax.div(index, plan.tiles) * len(sequences) + g for g in sequences]
        block = [r.first[s * plan.tiles + jax.lax.rem(index, plan.tiles)] for s in sequence]
        if plan.blocks > 1:
            copies = [_Copies(plan, r, g, s) for g, s in enumerate(sequence)]
            if plan.fetches_all:
                after = [c.start(r.follow[g, 0, 0], 0, _fixed(plan, 0)) for g, c in enumerate(copies)]
            else:
                after = [c.start_after(b, 0, _fixed(plan, 1)) for c, b in zip(copies, block, strict=True)]
        jobs = []
        for g in sequences:
            pools = _window_rows(plan, r, g)
            if plan.brought_leaves:
                pools.append(_entry_rows(plan, r, g, block[g], r.entry[g]))
            jobs += [(g, job) for job in _attend(plan, r.q.at[g], r.sinks, None, pools)]
        _interleave(jobs, functools.partial(_put if plan.blocks > 1 else _finish, r))
        if plan.blocks > 1:
            _stream(plan, r, copies, tuple(after))


def _fixed(plan: Plan, i):
    """Where the number of blocks is fixed: whether there is an i-th. The profiler wants as many starts as waits."""
    return None if plan.config.trips is None else i < plan.config.trips


def _stream(plan: Plan, r: _Refs, copies, block):
    """Attend to the blocks from `block` on; sequences that have no more go along with nothing to see."""

    trips = plan.config.trips

    def attend(i, carry):
        *block, slot = carry
        wanted = None if trips is None else _fixed(plan, i + 1)
        after = [c.start_after(b, 1 - slot, wanted) for c, b in zip(copies, block, strict=True)]
        for c, b in zip(copies, block, strict=True):
            c.wait(b, slot)
        jobs = []
        for g in range(len(copies)):
            pools = [_entry_rows(plan, r, g, block[g], [buffer.at[g, slot] for buffer in r.buffers], True)]
            jobs += [(g, job) for job in _attend(plan, r.q.at[g], r.sinks, [ref.at[g] for ref in r.state], pools)]
        _interleave(jobs, functools.partial(_put, r))
        return *after, 1 - slot

    if trips is None:
        any_left = lambda carry: functools.reduce(jnp.maximum, carry[:-1]) >= 0
        jax.lax.while_loop(any_left, functools.partial(attend, None), (*block, jnp.int32(0)))
    else:
        jax.lax.fori_loop(0 if plan.fetches_all else 1, trips, attend, (*block, jnp.int32(0)))
    everything = pl.ds(0, plan.config.tokens * plan.heads)
    for g in range(len(copies)):
        _finish(r, g, everything, [ref[g] for ref in r.state])


@dataclass(frozen=True)
class _Copies:
    """The copies of entry blocks of sequence `sequence`, the step's g-th."""

    plan: Plan
    refs: _Refs
    g: int
    sequence: Any

    def _act(self, block, slot, act):
        r, g = self.refs, self.g
        _copy(self.plan, r.pools, [buffer.at[g] for buffer in r.buffers], r.sems.at[g], self.sequence, block, slot, act)

    def start(self, block, slot, wanted=None):
        """Start to fetch `block` unless it is -1, or as `wanted` says; -> block."""
        pl.when(block >= 0 if wanted is None else wanted)(lambda: self._act(block, slot, lambda copy: copy.start()))
        return block

    def start_after(self, block, slot, wanted=None):
        """`start` the block that follows `block`, -1 for none."""
        return self.start(jnp.where(block < 0, -1, self.refs.follow[self.g, 0, block + 1]), slot, wanted)

    def wait(self, block, slot):
        wait = lambda: self._act(block, slot, lambda copy: copy.wait())
        if self.plan.config.sequences == 1:
            wait()  # the loop goes on only while there is a block
        else:
            pl.when(block >= 0)(wait)


def _window_rows(plan: Plan, r: _Refs, g: int):
    """What `_attend` takes for the window of the step's g-th sequence."""
    own = 0 if plan.share > 1 else g
    positions = jnp.concatenate([ref[own] for ref in r.window_positions], axis=1)
    bias = _held(r.window_bias, g, _window_bias(positions, r.bounds[g, :, 0:1], plan.window_size))
    rows = [_widen([leaf.at[own] for leaf in leaves], r.q.dtype, plan.native) for leaves in r.window]
    return [(jnp.concatenate(rows, axis=0), bias, False, None)]


def _entry_rows(plan: Plan, r: _Refs, g: int, block, leaves, copied: bool = False):
    """What `_attend` takes for one block of entries; block -1 shows nothing; if copied, memory may hold anything."""
    rest, dtype = plan.entries % plan.config.block, r.q.dtype
    shown = _entry_bias(plan, jnp.maximum(block, 0), r.bounds.at[g], None if r.bits is None else r.bits.at[g])
    bias = _held(r.entry_bias, g, jnp.where(block < 0, HIDDEN, shown))
    rows = _widen(leaves, dtype, plan.native, plan.poisoned)
    if rest and plan.blocks > 1 and not plan.poisoned:  # rows past the pool's end are whatever memory held
        row = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        rows = jnp.where(row < plan.entries - block * plan.config.block, rows.astype(jnp.float32), 0.0).astype(dtype)
    unsure = copied and plan.config.sequences > 1  # alone, a sequence stops after its last block
    return rows, bias, plan.poisoned or unsure, block >= 0 if unsure else None


def _held(ref, g: int, bias):
    """A bias of many tokens goes through memory, from where one token's is read as a broadcast."""
    if ref is None:
        return bias
    ref[g] = bias
    return ref.at[g]


def _put(r: _Refs, g: int, here, values):
    for ref, value in zip(r.state, values, strict=True):
        ref[g, here] = value


def _finish(r: _Refs, g: int, here, state):
    """Divide by the softmax's denominator and write what is asked for."""
    peak, lane_totals, out = state
    total = lane_totals.sum(axis=1, keepdims=True)
    safe = jnp.where(total == 0, 1.0, total)
    r.out[g, here] = (out * (1.0 / safe)).astype(r.out.dtype)
    if r.lse is not None:
        r.lse[g, here] = jnp.where(total == 0, -jnp.inf, (peak[:, :1] + jnp.log2(safe)) * (1 / LOG2E))


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
        functools.partial(_kernel, plan=plan, with_lse=return_lse),
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
