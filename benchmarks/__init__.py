"""Measurements; `python -m benchmarks NAME`. Imported by a child process that has no JAX, so nothing here needs it."""

from __future__ import annotations

import numpy as np


def random_prompt(tokens: int, vocab: int, rows: int = 1) -> np.ndarray:
    """The prompts that every side is timed on: int32 [rows, T], the same for the same arguments."""
    return np.random.default_rng(0).integers(0, vocab, (rows, tokens), dtype=np.int32)
