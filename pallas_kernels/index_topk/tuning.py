"""Block sizes of the TPU kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pallas_kernels.chips import Chip

SEARCHED = 8  # queries of decode that are searched together, one to a row of a register
DECODE_TOKENS = 8  # up to here a query's heads fill the rows of the matrix unit, and its scores whole registers


@dataclass(frozen=True)
class Config:
    """Block sizes of `index_topk_tpu`.

    query_tile: queries whose scores stay in VMEM together; one row of decode takes all its queries.
    key_block: keys of one DMA, 1024 times a power of two.
    columns: keys of one product, a multiple of 128 that divides key_block (1024 in decode).
    sequences: rows of decode that are searched together, a divisor of the batch, of at most 8 queries in all.
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
        most = SEARCHED // tokens
        together = max(n for n in range(1, min(most, max(batch // chip.cores, 1)) + 1) if batch % n == 0)
        return Config(tokens, key_block, 256, sequences=together)
    tile = 1 << (min(max(fits, 1), 128, tokens)).bit_length() - 1
    return Config(max(tile, 16), key_block, 1024)


GPU_MAX_TOP_K = 1024  # a full list of twice as many stays in the registers of a warp while it is searched
GPU_TILE = 128  # keys that are scored at a time
KEY_TILE_BYTES, CODE_TILE_BYTES, QUERY_BYTES = GPU_TILE * 256, GPU_TILE * 68, 64 * 256 + 64 * 4
RESERVED_BYTES = 2048  # of shared memory, for barriers and alignment
LEAST_SHARE = 4  # keys of a split over top_k: its list is at most a quarter of them


@dataclass(frozen=True)
class GpuConfig:
    """Sizes of `index_topk_gpu`.

    queries: of a block, for which each tile of keys is read once: 1, 2 or 4.
    splits: blocks that share the keys of a query.
    capacity: of a list, a multiple of 128.
    stages, code_stages, scored: tiles of keys, of 4-bit keys on their way, and of scores, that are held.
    """

    queries: int
    splits: int
    capacity: int
    stages: int
    code_stages: int
    scored: int = 4

    @property
    def outputs(self) -> int:
        """What the kernel gives: indices, and where lists are merged, their keys."""
        return 2 if self.splits > 1 else 1


def gpu_config(batch: int, tokens: int, entries: int, top_k: int, chip: Chip, *, is_coded: bool) -> GpuConfig:
    """As many splits as fill the chip, each with keys enough; as many stages as shared memory has room for."""
    queries = 1 << (min(tokens, 4) - 1).bit_length()
    capacity = 2 * GPU_TILE * math.ceil(top_k / GPU_TILE)
    blocks = batch * math.ceil(tokens / queries)
    splits = max(1, min(chip.cores // blocks, entries // (LEAST_SHARE * top_k), math.ceil(entries / GPU_TILE)))
    code_stages = 4 if queries < 4 else 2
    fixed = queries * (QUERY_BYTES + 8 * capacity + 4 * 4 * GPU_TILE + 16)
    fixed += code_stages * CODE_TILE_BYTES if is_coded else 0
    stages = min(4, (chip.smem_bytes - RESERVED_BYTES - fixed) // KEY_TILE_BYTES)
    return GpuConfig(queries, splits, capacity, stages, code_stages)
