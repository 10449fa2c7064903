"""The kernel of sparse MLA on TPU: what a grid step reads, in which order, and where its results go."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_mla.tpu_attend import HIDDEN, LOG2E, Plan, Pool, attend, interleave, widen
from pallas_kernels.sparse_mla.tuning import LANES


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


def kernel(*refs, plan: Plan, with_lse: bool):
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
            pools = [_window_rows(plan, r, g)]
            if plan.brought_leaves:
                pools.append(_entry_rows(plan, r, g, block[g], r.entry[g]))
            jobs += [(g, job) for job in attend(plan, r.q.at[g], r.sinks, None, pools)]
        interleave(jobs, functools.partial(_put if plan.blocks > 1 else _finish, r))
        if plan.blocks > 1:
            _stream(plan, r, copies, tuple(after))


def _fixed(plan: Plan, i):
    """Where the number of blocks is fixed: whether there is an i-th. The profiler wants as many starts as waits."""
    return None if plan.config.trips is None else i < plan.config.trips


def _stream(plan: Plan, r: _Refs, copies, block):
    """Attend to the blocks from `block` on; sequences that have no more go along with nothing to see."""

    trips = plan.config.trips

    def turn(i, carry):
        *block, slot = carry
        wanted = None if trips is None else _fixed(plan, i + 1)
        after = [c.start_after(b, 1 - slot, wanted) for c, b in zip(copies, block, strict=True)]
        for c, b in zip(copies, block, strict=True):
            c.wait(b, slot)
        jobs = []
        for g in range(len(copies)):
            pools = [_entry_rows(plan, r, g, block[g], [buffer.at[g, slot] for buffer in r.buffers], True)]
            jobs += [(g, job) for job in attend(plan, r.q.at[g], r.sinks, [ref.at[g] for ref in r.state], pools)]
        interleave(jobs, functools.partial(_put, r))
        return *after, 1 - slot

    if trips is None:
        any_left = lambda carry: functools.reduce(jnp.maximum, carry[:-1]) >= 0
        jax.lax.while_loop(any_left, functools.partial(turn, None), (*block, jnp.int32(0)))
    else:
        jax.lax.fori_loop(0 if plan.fetches_all else 1, trips, turn, (*block, jnp.int32(0)))
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


def _window_rows(plan: Plan, r: _Refs, g: int) -> Pool:
    """The window of the step's g-th sequence."""
    own = 0 if plan.share > 1 else g
    positions = jnp.concatenate([ref[own] for ref in r.window_positions], axis=1)
    bias = _held(r.window_bias, g, _window_bias(positions, r.bounds[g, :, 0:1], plan.window_size))
    rows = [widen([leaf.at[own] for leaf in leaves], r.q.dtype, plan.native) for leaves in r.window]
    return Pool(jnp.concatenate(rows, axis=0), bias)


def _entry_rows(plan: Plan, r: _Refs, g: int, block, leaves, copied: bool = False) -> Pool:
    """One block of entries; block -1 shows nothing; if copied, memory may hold anything."""
    rest, dtype = plan.entries % plan.config.block, r.q.dtype
    shown = _entry_bias(plan, jnp.maximum(block, 0), r.bounds.at[g], None if r.bits is None else r.bits.at[g])
    bias = _held(r.entry_bias, g, jnp.where(block < 0, HIDDEN, shown))
    rows = widen(leaves, dtype, plan.native, plan.poisoned)
    if rest and plan.blocks > 1 and not plan.poisoned:  # rows past the pool's end are whatever memory held
        row = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        rows = jnp.where(row < plan.entries - block * plan.config.block, rows.astype(jnp.float32), 0.0).astype(dtype)
    unsure = copied and plan.config.sequences > 1  # alone, a sequence stops after its last block
    return Pool(rows, bias, plan.poisoned or unsure, block >= 0 if unsure else None)


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
