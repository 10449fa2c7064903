"""The machine of `pallas_kernels.index_topk.gpu_select` on arrays: what its warps do, in step, lane by lane."""

from __future__ import annotations

import numpy as np

LANES = 32


class Lanes:
    """Words are int32 [warps, 32], memories int32 [n]; an access out of bounds, or twice to one place, is an error."""

    def __init__(self, warps: int = 1):
        self.warps, self.shape = warps, (warps, LANES)
        self.lane = np.broadcast_to(np.arange(LANES, dtype=np.int32), self.shape)
        self.warp = np.broadcast_to(np.arange(warps, dtype=np.int32)[:, None], self.shape)
        self.below = ((np.int64(1) << self.lane) - 1).astype(np.int32)

    def word(self, value):
        return np.full(self.shape, value, np.int32)

    def pick(self, flag, one, other):
        return np.where(flag, one, other).astype(np.int32)

    def equal(self, a, b):
        return np.asarray(a == b)

    def differ(self, a, b):
        return np.asarray(a != b)

    def halve(self, a):
        return (a.view(np.uint32) >> 1).view(np.int32)

    def ones(self, word):
        return np.bitwise_count(word.view(np.uint32)).astype(np.int32)

    def count(self, flags):
        return np.sum(flags, axis=0, dtype=np.int32)

    def ballot(self, flag):
        bits = np.broadcast_to(flag, self.shape).astype(np.uint32) << self.lane.astype(np.uint32)
        return np.broadcast_to(bits.sum(1, keepdims=True, dtype=np.uint32), self.shape).copy().view(np.int32)

    def total(self, word):
        return self.word(word.sum())

    def before(self, word):
        each = word.sum(1, keepdims=True)
        return np.broadcast_to(np.cumsum(each, axis=0) - each, self.shape).astype(np.int32), self.word(each.sum())

    def loop(self, bound, carry, body):
        for i in range(bound):
            carry = body(np.int32(i), carry)
        return carry

    def repeat(self, carry, going, body):
        while self._uniform(going(carry)):
            carry = body(carry)
        return carry

    def when(self, flag, body):
        if self._uniform(flag):
            body()

    def load(self, memory, index):
        index = np.broadcast_to(index, self.shape)
        assert (index >= 0).all() and (index < memory.size).all()
        return memory[index]

    def store(self, memory, index, value, where):
        index, value, where = (np.broadcast_to(x, self.shape) for x in (index, value, where))
        index = index[where]
        assert (index >= 0).all() and (index < memory.size).all() and np.unique(index).size == index.size
        memory[index] = value[where]

    def sync(self):
        pass

    def _uniform(self, flag) -> bool:
        assert flag.all() or not flag.any()
        return bool(flag.all())
