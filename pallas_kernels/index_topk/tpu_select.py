"""The k best of a few queries' scores on TPU, and the list of their indices, by whole registers of bits.

Scores of 8 queries lie as [chunk, query, lane], 128 entries to a chunk. Each 32 chunks are turned so that a word holds
one bit of 32 scores: 32 planes, of which the search reads four at a time, the highest first. In a word that has a bit
for every score that is still a candidate, each such digit costs a few operations however many scores tie, and the bits
of an entry's index, inverted, come after those of its score: the lower index wins.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mask_bits import LANES, WORD

QUERIES = 8  # searched together, one to a row of a register
DIGIT = 4  # bits found in one step
DEPTH = LANES  # rows of chunks that one product of `list_bits` sums over
UNROLLED = 4  # words of candidates that are worked on together; up to here without a loop
PLANE = (QUERIES, LANES)
EVERY = -1  # a word of ones


def turn_bits(scores_ref, group) -> None:
    """32 chunks of int32 scores [32 * 8, 128] -> 32 planes: bit c of plane p is bit p of chunk c, p = 31 inverted."""
    rows = lambda i: pl.ds(pl.multiple_of((group * WORD + i) * QUERIES, QUERIES), QUERIES)
    words = [scores_ref[rows(i)] for i in range(WORD)]
    for width, mask in ((16, 0xFFFF), (8, 0xFF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        for i in range(WORD):
            if not i & width:
                low, high = words[i], words[i + width]
                moved = (jax.lax.shift_right_logical(low, width) ^ high) & mask
                words[i], words[i + width] = low ^ (moved << width), high ^ moved
    words[-1] = ~words[-1]  # the order of signed numbers
    for i, word in enumerate(words):
        scores_ref[rows(i)] = word


@dataclass(frozen=True)
class Search:
    """Where the search keeps its state, one word [8, 128] for each 32 chunks of the scores.

    planes: as `turn_bits` leaves them. candidates: bits of scores that agree in all digits so far. above: of those that
    are greater. groups: how many words there are; most: at most. Beyond UNROLLED they are whole multiples of it.
    """

    planes: Any
    candidates: Any
    above: Any
    groups: Any
    most: int
    data_dependent: bool

    def words(self, body: Callable, carry):
        """`body(word, carry)` for each word."""
        if self.most <= UNROLLED:
            return functools.reduce(lambda carry, i: body(i, carry), range(self.most), carry)
        several = lambda i, carry: functools.reduce(lambda c, j: body(i * UNROLLED + j, c), range(UNROLLED), carry)
        return jax.lax.fori_loop(0, self.groups // UNROLLED, several, carry)

    def score_digit(self, step) -> Callable:
        """The planes of the step-th digit, highest first, of one word of chunks."""

        def planes(group) -> list[jax.Array]:
            first = WORD - 1 - step * DIGIT
            at = lambda i: pl.multiple_of((group * WORD + first - i) * QUERIES, QUERIES)
            return [self.planes[pl.ds(at(i), QUERIES)] for i in range(DIGIT)]

        return planes

    def index_digits(self) -> list[Callable]:
        """The same of an entry's index, inverted."""
        lane = jax.lax.broadcasted_iota(jnp.int32, PLANE, 1)
        groups = [lambda group, b=b: jnp.where((group >> b) & 1, 0, EVERY) for b in range((self.most - 1).bit_length())]
        chunks = [lambda _, m=m: m for m in (0x55555555, 0x33333333, 0x0F0F0F0F, 0x00FF00FF, 0x0000FFFF)]
        lanes = [lambda _, b=b: jnp.where((lane >> b) & 1, 0, EVERY) for b in range(LANES.bit_length() - 1)]
        bits = [*reversed(groups), *reversed(chunks), *reversed(lanes)]
        plane = lambda bit, group: jnp.broadcast_to(jnp.asarray(bit(group), jnp.int32), PLANE)
        return [
            lambda group, some=some: [plane(bit, group) for bit in some]
            for some in (bits[i : i + DIGIT] for i in range(0, len(bits), DIGIT))
        ]

    def narrow(self, planes: Callable, digits: int, state):
        """One digit: the greatest that enough candidates reach. State: picks wanted of the candidates, and those."""
        wanted, held = state

        def count(group, found):
            leaves = [self.candidates[group]]
            for plane in planes(group):
                leaves = [leaf for word in leaves for leaf in (word & plane, word & ~plane)]  # highest digit first
            return [f + jax.lax.population_count(leaf) for f, leaf in zip(found, leaves[:-1], strict=True)]

        zeros = [jnp.zeros(PLANE, jnp.int32)] * (2**digits - 1)
        reached = itertools.accumulate(self.words(count, zeros))
        totals = [_lane_sum(x.astype(jnp.float32)) for x in reached]
        enough = [total >= wanted for total in totals]
        digit = sum(e.astype(jnp.int32) for e in enough)
        above = functools.reduce(jnp.maximum, [jnp.where(e, 0.0, t) for e, t in zip(enough, totals, strict=True)])
        upto = functools.reduce(jnp.minimum, [jnp.where(e, t, held) for e, t in zip(enough, totals, strict=True)])
        chosen = [jnp.where((digit >> b) & 1, EVERY, 0) for b in reversed(range(digits))]

        def keep(group, carry):
            word, over = self.candidates[group], self.above[group]
            for plane, bit in zip(planes(group), chosen, strict=True):
                ones = word & plane
                over |= ones & ~bit
                word = jnp.where(bit == 0, word ^ ones, ones)
            self.candidates[group], self.above[group] = word, over
            return carry

        self.words(keep, 0)
        return wanted - above, upto - above

    def run(self, wanted: jax.Array, entries) -> None:
        """Leave in `above` the bits of the `wanted` (fp32 [8, 128], the same in every lane) best of each query."""

        def begin(group, carry):
            self.candidates[group] = jnp.full(PLANE, EVERY, jnp.int32)
            return carry

        self.words(begin, 0)
        self.above[...] = jnp.zeros(self.above.shape, jnp.int32)  # also of words that nobody looks at
        going = lambda s: jnp.max(jnp.where(s[0] > 0, jnp.abs(s[1] - s[0]), 0.0)) > 0
        step = lambda i, s: self.narrow(self.score_digit(i), DIGIT, s)
        state = wanted, jnp.broadcast_to(jnp.asarray(entries, jnp.float32), PLANE)

        def ties(state):
            for planes in self.index_digits():
                state = self.narrow(planes, len(planes(0)), state)
            return state

        if self.data_dependent:
            more = lambda s: (s[0] < WORD // DIGIT) & going(s[1])
            state = jax.lax.while_loop(more, lambda s: (s[0] + 1, step(*s)), (0, state))[1]
            pl.when(going(state))(lambda: ties(state) and None)
        else:
            ties(jax.lax.fori_loop(0, WORD // DIGIT, step, state))
        some = jnp.where(wanted > 0, EVERY, 0)

        def join(group, carry):
            self.above[group] |= self.candidates[group] & some
            return carry

        self.words(join, 0)


def _lane_sum(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.sum(x, axis=-1, keepdims=True), x.shape)


def spread_bits(word: jax.Array) -> jax.Array:
    """int32 [1, 128] -> its bits, int32 [32, 128] of 0 and 1."""
    bit = jax.lax.broadcasted_iota(jnp.int32, (WORD, LANES), 0)
    return jax.lax.shift_right_logical(jnp.broadcast_to(word, bit.shape), bit) & 1


def whole_groups(groups):
    """So many words of candidates, or the next number that `Search` takes."""
    return pl.cdiv(groups, UNROLLED) * UNROLLED


def list_bits(queries: list[list[jax.Array]], slots: int) -> list[jax.Array]:
    """Ascending indices of the bits set in at most four words [1, 128] of each query; int32 [1, slots], then -1.

    There is no scatter, so each slot looks for its entry. Row r of 128 entries counts for slot j where at most j picks
    come before it. D[l, r] is what the picks up to lane l of row r have over those up to lane l of the row before;
    summed over the rows that count for j, it is how many are picked up to lane l of the last, which holds j's entry.
    """
    rows = WORD * len(queries[0])
    each = max(1, DEPTH // rows)  # queries of one product
    batches = [queries[i : i + each] for i in range(0, len(queries), each)]
    found = [_differences(batch) for batch in batches]  # each stage for all queries: one's products overlap the next
    counted = [_starts(picks, rows) for _, picks in found]
    upto = [_upto(D, starts, rows, slots) for (D, _), (starts, _) in zip(found, counted, strict=True)]
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, slots), 1).astype(jnp.float32)
    listed = []
    for several, (_, totals) in zip(upto, counted, strict=True):
        for counts, total in zip(several, totals, strict=True):
            lanes = jnp.sum((counts[:LANES] <= slot).astype(jnp.float32), axis=0, keepdims=True)
            index = LANES * (counts[LANES : LANES + 1] - 1) + lanes
            filled = slot < jnp.concatenate([total] * (slots // LANES), axis=1)
            listed.append(jnp.where(filled, index.astype(jnp.int32), -1))
    return listed


def _differences(queries: list[list[jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """D of `list_bits` with eight rows of ones, bf16 [136, rows of all queries], and the picks, bf16 [rows, 128]."""
    picks = jnp.concatenate([spread_bits(word) for words in queries for word in words], axis=0)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    first = jax.lax.broadcasted_iota(jnp.int32, picks.shape, 0) % (WORD * len(queries[0])) == 0
    before = jnp.where(first, 0, jnp.roll(picks, 1, 0))
    both = as_bf16(jnp.concatenate([picks, before], axis=1))
    D = product(as_bf16(jnp.concatenate([lane <= row, lane > row], axis=1)), both, NT)
    return as_bf16(jnp.concatenate([D, jnp.ones((QUERIES, D.shape[1]), jnp.float32)], axis=0)), both[:, :LANES]


def _starts(picks: jax.Array, rows: int) -> tuple[jax.Array, list[jax.Array]]:
    """How many of a query's picks come before each row, fp32 [rows of all, 128], alike in all lanes; and how many each
    query has, [1, 128]."""
    every = picks.shape[0]
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (every, every), axis) for axis in (0, 1))
    per_row = product(picks, jnp.ones((LANES, LANES), jnp.bfloat16))
    starts = product(as_bf16((lane < row) & (lane // rows == row // rows)), as_bf16(per_row))
    return starts, [(starts + per_row)[i + rows - 1 : i + rows] for i in range(0, every, rows)]


def _upto(D: jax.Array, starts: jax.Array, rows: int, slots: int) -> list[jax.Array]:
    """For each slot, a query's picks up to each lane of its row, and below them its row's number plus one; fp32
    [136, slots] a query."""
    slot = jax.lax.broadcasted_iota(jnp.int32, (starts.shape[0], LANES), 1).astype(jnp.float32)
    counts = jnp.concatenate([as_bf16(starts <= slot + first) for first in range(0, slots, LANES)], axis=1)
    query = jax.lax.broadcasted_iota(jnp.int32, D.shape, 1) // rows
    return [product(jnp.where(query == i, D, 0), counts) for i in range(starts.shape[0] // rows)]


NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


def as_bf16(x) -> jax.Array:
    """Truth values and counts up to 256 are exact in bf16; a product of them sums in fp32."""
    return x.astype(jnp.float32).astype(jnp.bfloat16)


def product(a, b, dimensions=NN) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
