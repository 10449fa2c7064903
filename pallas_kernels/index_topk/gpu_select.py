"""Exact selection by warps, written against a machine.

Scores are held as integers of the same order, beside their entries, in the order of the entries; so the lower index of
a tie is the one that comes first. A list that is full keeps its `top_k` best: counting finds the least of them bit by
bit, and what stays moves to the front, its order kept.

The machine, `m`, is `gpu_warps.Warps`, which emits code, or that of the tests, which does the same on arrays.
"""

from __future__ import annotations

HIDDEN = -(2**31)  # below the integer of every score
LANES = 32
TILE = 128  # entries that are scored at a time
COUNT, LEAST, VISIBLE, STATE = 0, 1, 2, 4  # words of a list's state: what it holds, what is too low, entries to see
AT_ONCE = 4  # rounds of 32 that `compact` loads together


def ordered(m, bits):
    """The bits of an fp32 -> int32 of the same order, with one zero."""
    bits = m.pick(m.equal(bits, HIDDEN), 0, bits)
    return m.pick(bits < 0, bits ^ 0x7FFFFFFF, bits)


def begin(m, state, visible) -> None:
    """An empty list, for a query that sees `visible` entries."""
    for place, value in ((COUNT, 0), (LEAST, HIDDEN), (VISIBLE, visible)):
        m.store(state, place, value, m.equal(m.lane, 0))
    m.sync()


def append(m, scores, keys, index, state, start, *, capacity: int, top_k: int) -> None:
    """Add the entries start .. start + 127 to the list; those that can no longer be picked stay out."""
    m.when(m.load(state, COUNT) > capacity - TILE, lambda: prune(m, keys, index, state, capacity=capacity, top_k=top_k))
    count, least, visible = (m.load(state, place) for place in (COUNT, LEAST, VISIBLE))
    loaded = [m.load(scores, m.lane + i) for i in range(0, TILE, LANES)]
    for i, bits in zip(range(0, TILE, LANES), loaded, strict=True):
        key, entry = ordered(m, bits), m.lane + i + start
        wanted = (key > least) & (entry < visible)
        mask = m.ballot(wanted)
        place = count + m.ones(mask & m.below)
        m.store(keys, place, key, wanted)
        m.store(index, place, entry, wanted)
        count = count + m.ones(mask)
    m.store(state, COUNT, count, m.equal(m.lane, 0))
    m.sync()


def prune(m, keys, index, state, *, capacity: int, top_k: int) -> None:
    """Keep the `top_k` best of a list that has more."""
    count = m.load(state, COUNT)
    at = [m.lane + i for i in range(0, capacity, LANES)]
    values = [m.pick(i < count, m.load(keys, i), HIDDEN) for i in at]
    least = kth_largest(m, values, top_k)
    spare = m.total(m.count([v > least for v in values])) * -1 + top_k

    def load(i):
        return m.pick(i < count, m.load(keys, i), HIDDEN), m.load(index, i)

    def store(place, key, entry, wanted):
        m.store(keys, place, key, wanted)
        m.store(index, place, entry, wanted)

    compact(m, capacity // LANES, load, store, least, spare, m.word(0), m.word(0))
    m.store(state, COUNT, top_k, m.equal(m.lane, 0))
    m.store(state, LEAST, least, m.equal(m.lane, 0))
    m.sync()


def finish(m, keys, index, state, everything, first, out_index, out_keys=None, *, capacity: int, top_k: int) -> None:
    """Write the list's `top_k` best, -1 after them; out_keys: None if nobody will compare them with others.

    everything: 1 where no entry was scored, for all are picked; `first`: 1 for the list that says so.
    """
    m.when(m.load(state, COUNT) > top_k, lambda: prune(m, keys, index, state, capacity=capacity, top_k=top_k))
    everything, first = m.equal(everything, 1), m.equal(first, 1)
    count, visible = m.load(state, COUNT), m.load(state, VISIBLE)
    count = m.pick(everything, m.pick(first, visible, 0), count)

    def step(j, carry):
        i = m.lane + j * LANES
        held, used = i < count, i < top_k
        m.store(out_index, i, m.pick(held, m.pick(everything, i, m.load(index, i)), -1), used)
        if out_keys is not None:
            m.store(out_keys, i, m.pick(held, m.pick(everything, 0, m.load(keys, i)), HIDDEN), used)
        return carry

    m.loop(-(-top_k // LANES), (), step)


def merge(m, keys, index, length, out_keys, out_index, *, rounds: int, top_k: int) -> None:
    """The `top_k` best of `length` candidates that lie in the order of their entries, by all warps together.

    rounds: of 32 candidates that each warp has; those of index -1 are HIDDEN.
    """
    first = m.warp * (rounds * LANES) + m.lane

    def key(i):
        inside = i < length
        return m.pick(inside, m.load(keys, m.pick(inside, i, 0)), HIDDEN)

    values = [key(first + j * LANES) for j in range(rounds)]
    least = kth_largest(m, values, top_k)
    above, above_all = m.before(m.count([v > least for v in values]))
    tied, tied_all = m.before(m.count([m.equal(v, least) for v in values]))
    spare = m.pick(m.equal(least, HIDDEN), 0, above_all * -1 + top_k)

    def load(i):
        i = i + m.warp * (rounds * LANES)
        return key(i), m.load(index, m.pick(i < length, i, 0))

    def store(place, key, entry, wanted):
        m.store(out_keys, place, key, wanted)
        m.store(out_index, place, entry, wanted)

    compact(m, rounds, load, store, least, spare, above, tied)
    kept = above_all + m.pick(tied_all < spare, tied_all, spare)

    def fill(j, carry):
        i = m.lane + (m.warp + j * m.warps) * LANES
        store(i, HIDDEN, -1, (i >= kept) & (i < top_k))
        return carry

    m.loop(-(-top_k // (m.warps * LANES)), (), fill)


def kth_largest(m, values: list, k: int):
    """The k-th largest of the values of all lanes, found from its highest bit down.

    Or less, if just k values reach that: then nobody need look further.
    """

    def narrow(carry):
        found, bit, reached = carry
        candidate = found | bit
        threshold = candidate ^ HIDDEN
        count = m.total(m.count([v >= threshold for v in values]))
        enough = count >= k
        return m.pick(enough, candidate, found), m.halve(bit), m.pick(enough, count, reached)

    going = lambda carry: m.differ(carry[1], 0) & m.differ(carry[2], k)
    found, _, _ = m.repeat((m.word(0), m.word(HIDDEN), m.word(-1)), going, narrow)
    return found ^ HIDDEN


def compact(m, rounds: int, load, store, least, spare, above, tied) -> None:
    """Store what is above `least`, and the first `spare` of those equal to it, one after the other.

    above, tied: how many of either come before this warp's.
    """
    at_once = next(n for n in (AT_ONCE, 2, 1) if rounds % n == 0)

    def step(j, carry):
        above, tied = carry
        some = [load(m.lane + (j * at_once + n) * LANES) for n in range(at_once)]
        for key, entry in some:
            upper, equal = key > least, m.equal(key, least)
            uppers, equals = m.ballot(upper), m.ballot(equal)
            rank = tied + m.ones(equals & m.below)
            fits = rank < spare
            place = above + m.ones(uppers & m.below) + m.pick(fits, rank, spare)
            store(place, key, entry, upper | (equal & fits))
            above, tied = above + m.ones(uppers), tied + m.ones(equals)
        return above, tied

    m.loop(rounds // at_once, (above, tied), step)
