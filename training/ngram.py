"""A 5-gram model with back-off: interpolated Kneser-Ney with one discount per order, as plainly as it can be said."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence

import numpy as np


class KneserNey:
    """Probabilities of the next token given the `order` - 1 before it.

    The longest n-grams count occurrences, shorter ones the distinct tokens seen in front of them; below the unigrams
    lies the uniform distribution. The discount of an order is n1 / (n1 + 2 n2), its counts of counts (Ney et al. 1994).
    """

    def __init__(self, texts: Iterable[Sequence[int] | np.ndarray], vocab: int, order: int = 5):
        self.vocab, self.order = vocab, order
        top: collections.Counter[tuple[int, ...]] = collections.Counter()
        starts: set[tuple[int, ...]] = set()  # n-grams at a text's beginning have nothing in front of them
        for text in texts:
            ids = tuple(map(int, text))
            top.update(ids[i : i + order] for i in range(len(ids) - order + 1))
            starts |= {ids[:n] for n in range(1, order)}
        counts = {order: top}
        for n in range(order - 1, 0, -1):
            counts[n] = collections.Counter(gram[1:] for gram in counts[n + 1])
            for gram in starts:
                if len(gram) == n:
                    counts[n][gram] += 1
        self.counts = counts
        self.discount = {n: _discount(counts[n].values()) for n in counts}
        self.total: dict[tuple[int, ...], int] = collections.Counter()  # by context
        self.kinds: dict[tuple[int, ...], int] = collections.Counter()  # distinct continuations of a context
        for table in counts.values():
            for gram, count in table.items():
                self.total[gram[:-1]] += count
                self.kinds[gram[:-1]] += 1

    def probability(self, context: tuple[int, ...], token: int) -> float:
        p = 1 / self.vocab
        for n in range(1, self.order + 1):
            before = context[len(context) - n + 1 :] if n > 1 else ()
            if len(before) != n - 1 or not self.total.get(before):
                break
            discount, count = self.discount[n], self.counts[n].get((*before, token), 0)
            p = (max(count - discount, 0) + discount * self.kinds[before] * p) / self.total[before]
        return p

    def loss(self, text: Sequence[int] | np.ndarray, first: int = 0) -> np.ndarray:
        """-log p in nats of tokens first .. of one text, fp64."""
        ids = tuple(map(int, text))
        near = self.order - 1
        return np.array(
            [-math.log(self.probability(ids[max(0, i - near) : i], ids[i])) for i in range(first, len(ids))]
        )


def _discount(counts: Iterable[int]) -> float:
    of = collections.Counter(counts)
    return of[1] / (of[1] + 2 * of[2]) if of[1] and of[2] else 0.5
