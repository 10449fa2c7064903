"""The few PTX instructions that kernels write by hand, on arrays of words: what no interpreter of Pallas's runs."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np


def run(text: str, *operands) -> np.ndarray:
    """uint32 words that `text` leaves in $0, for uint32 words in $1, $2, ..; an unknown instruction is a KeyError."""
    values = {f"${n + 1}": np.asarray(x, np.uint32) for n, x in enumerate(operands)}
    read = lambda name: values[name] if name in values else np.uint32(int(name, 0))
    for line in text.strip().strip("{}").split(";"):
        words = re.split(r"[,\s]+", line.strip())
        if words[0] and words[0] != ".reg":
            values[words[1]] = OPS[words[0]](*map(read, words[2:]))
    return values["$0"]


def _permute(a, b, selector):
    both = np.uint64(a) | np.uint64(b) << np.uint64(32)
    picks = [int(selector) >> 4 * n & 0xF for n in range(4)]
    return sum((both >> np.uint64(8 * pick) & np.uint64(255)) << np.uint64(8 * n) for n, pick in enumerate(picks))


def _multiply_bf16(a, b):
    halves = [np.ascontiguousarray(x).view(np.uint16).view(jnp.bfloat16.dtype) for x in np.broadcast_arrays(a, b)]
    product = halves[0].astype(np.float64) * halves[1].astype(np.float64)
    return product.astype(jnp.bfloat16.dtype).view(np.uint32).reshape(np.broadcast_shapes(np.shape(a), np.shape(b)))


OPS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: (a.astype(np.uint64) * b & 0xFFFFFFFF).astype(np.uint32),
    "setp.eq.u32": lambda a, b: a == b,
    "selp.b32": lambda a, b, p: np.where(p, a, b).astype(np.uint32),
    "prmt.b32": lambda a, b, c: np.asarray(_permute(a, b, c), np.uint32),
    "mul.rn.bf16x2": _multiply_bf16,
}
