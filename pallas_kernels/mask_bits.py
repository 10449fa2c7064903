"""Picked entries as bits, 32 to a word, in the order in which a TPU packs and unpacks them without moving lanes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

LANES, WORD = 128, 32
GROUP = LANES * WORD  # entries of 128 words


@functools.partial(jax.tree_util.register_dataclass, data_fields=("words",), meta_fields=("size",))
@dataclass(frozen=True)
class MaskBits:
    """Each query picks the entries whose bit is set.

    words: int32 [B, T, 128 * ceil(size / 4096)]. Entry i is bit (i // 128) % 32 of word (i // 4096) * 128 + i % 128:
      bit b of the 128 words of group g stands for the 128 entries from 4096 * g + 128 * b on. Bits past `size` are 0.
    size: the number of entries, N.
    """

    words: jax.Array
    size: int


def words_for(entries: int) -> int:
    """Words that hold the bits of so many entries."""
    return -(-entries // GROUP) * LANES


def pack_mask(mask: jax.Array) -> MaskBits:
    """bool [B, T, N] -> MaskBits."""
    *lead, size = mask.shape
    bits = min(WORD, -(-size // LANES))  # that are used at all: few, where there are few entries
    mask = jnp.pad(mask, [(0, 0)] * len(lead) + [(0, -size % (bits * LANES))])
    planes = mask.reshape(*lead, -1, bits, LANES).astype(jnp.int32) << jnp.arange(bits, dtype=jnp.int32)[:, None]
    return MaskBits(planes.sum(-2, dtype=jnp.int32).reshape(*lead, -1), size)


def unpack_mask(bits: MaskBits) -> jax.Array:
    """MaskBits -> bool [B, T, size]."""
    *lead, _ = bits.words.shape
    words = bits.words.reshape(*lead, -1, 1, LANES)
    planes = (words >> jnp.arange(WORD, dtype=jnp.int32)[:, None]) & 1
    return planes.reshape(*lead, -1)[..., : bits.size].astype(bool)
