"""Block sizes of the TPU kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pallas_kernels.chips import Chip

SEARCHED = 4  # queries of decode that are searched together: their numbers stay in registers
DECODE_TOKENS = 8  # up to here a query's heads fill the rows of the matrix unit, and its scores whole registers


@dataclass(frozen=True)
class Config:
    """Block sizes of `index_topk_tpu`.

    query_tile: queries whose scores stay in VMEM together; one row of decode takes all its queries.
    key_block: keys of one DMA, 1024 times a power of two.
    columns: keys of one product, a multiple of 128 that divides key_block (1024 in decode).
    sequences: rows of decode that are searched together, a divisor of the batch; one in prefill.
    data_dependent: stop a search once its answer is known, and skip keys that no query of a tile may see; False makes
      every trip count a constant, the worst case, which is what a static profile can count.
    """

    query_tile: int
    key_block: int
    columns: int
    data_dependent: bool = True
    sequences: int = 1


def default_config(tokens: int, entries: int, chip: Chip, batch: int = 1) -> Config:
    """For `tokens` queries a row and `entries` keys: half the VMEM for scores, at most 128 queries."""
    decode = tokens <= DECODE_TOKENS
    blocks = math.ceil(entries / 1024)
    key_block = min(8192 if decode else 1024, 1024 << (blocks - 1).bit_length())
    padded = key_block * math.ceil(entries / key_block)
    fits = chip.vmem_bytes // 2 // (4 * padded)
    if decode:
        most = max(1, min(fits, SEARCHED) // tokens)
        together = max(n for n in range(1, min(most, max(batch // chip.cores, 1)) + 1) if batch % n == 0)
        return Config(tokens, key_block, 256, sequences=together)
    tile = 1 << (min(max(fits, 1), 128, tokens)).bit_length() - 1
    return Config(max(tile, 16), key_block, 1024)
