"""A tile's queries attend to rows that are in vector memory: the arithmetic of `tpu_kernel`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.fp8_matmul.tpu import B11_FACTOR, mxu_codes
from pallas_kernels.kv_rows import GROUP
from pallas_kernels.sparse_mla.tuning import LANES, TpuConfig

LOG2E = math.log2(math.e)
HIDDEN = -2e30  # added to the logit of a row that is not picked
LOWEST = -1e29  # least running maximum: above HIDDEN by so much that hidden rows weigh exactly nothing
B11_SHIFT = int(math.log2(B11_FACTOR))
ROW_ALIGN = 32  # rows of an 8-bit array that lie in one tile of memory
AHEAD = 2  # pieces of work whose scores are computed early
MAX_EXPONENT = 246  # of an e8m0 scale: the largest that no e4m3 code takes past what bfloat16 holds


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


def widen(leaves, dtype, native: bool, poisoned: bool = False):
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


@dataclass(frozen=True)
class Pool:
    """KV rows [S, D] that a tile's tokens attend to, under bias [tokens, S], an array or a ref.

    unsure: scores may be NaN. filled: None, or whether there are rows at all.
    """

    rows: jax.Array
    bias: Any
    unsure: bool = False
    filled: Any = None


def attend(plan: Plan, q_ref, sinks_ref, state, pools: list[Pool]):
    """Jobs, one per piece of a tile: a step of the running softmax over `pools`. A job is a generator: it yields None
    after its scores, then (query rows, (peak, total, output)).

    state: what the steps before left, or None.
    """
    count = plan.config.rows // plan.heads
    for token in range(0, plan.config.tokens, count):
        yield _attend_piece(plan, q_ref, sinks_ref, state, pools, token, count)


def _attend_piece(plan: Plan, q_ref, sinks_ref, state, pools: list[Pool], token: int, count: int):
    here = pl.ds(token * plan.heads, plan.config.rows)
    logits = [_logits(q_ref[here], p.rows, p.bias[token : token + count], p.unsure, plan) for p in pools]
    yield None
    sink = jnp.concatenate([sinks_ref[...] * LOG2E] * count, axis=0)
    before = jnp.maximum(sink, LOWEST) if state is None else state[0][here]
    peak = jnp.maximum(before, _row_max(sum(logits, [])))
    weights = [[jnp.exp2(x - peak[:, : x.shape[1]]) for x in part] for part in logits]
    total = _lane_sums(sum(weights, []))
    parts = []
    for w, pool in zip(weights, pools, strict=True):
        part = _product(jnp.concatenate(w, axis=1).astype(pool.rows.dtype), pool.rows, transposed=False)
        parts.append(part if pool.filled is None else jnp.where(pool.filled, part, 0.0))
    out = functools.reduce(jnp.add, parts)
    if state is None:
        total = total + _in_lane_0(jnp.exp2(sink - peak))
    else:
        keep, D = jnp.exp2(before - peak), out.shape[1]
        total = total + state[1][here] * keep
        out = out + state[2][here] * jnp.concatenate([keep] * math.ceil(D / LANES), axis=1)[:, :D]
    yield here, (peak, total, out)


def interleave(jobs, store):
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
