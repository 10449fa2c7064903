"""Block sizes of the sparse MLA kernels by shape and chip."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.chips import Chip

LANES = 128
TARGET_ROWS = 1024  # query rows (tokens x heads) of one tile at prefill: enough to hide the reading of KV rows
MAX_BLOCK = 512
MAX_NARROW_BLOCK = 1024  # on v7x, for few query rows: its matrix units wait at the end of every turn of the loop
NARROW_ROWS = 64  # query rows of a tile up to which registers suffice for such a block
MAX_WHOLE_WINDOW = 2048  # rows; a longer window is read in blocks, and so must be in order
PIECE_ROWS = 256  # query rows worked on at a time
GATHER_CYCLES = 6  # of one row by XLA, which reads and writes it; from the compiler's schedule for v6e
MXU_SHARE = 0.6  # of the peak that the kernel reaches
DECODE_TOKENS = 16  # up to this many tokens of a sequence form one tile


@dataclass(frozen=True)
class TpuConfig:
    """Block sizes of the TPU kernel.

    sequences: sequences of one grid step (more than 1 only at decode); tokens: query tokens of a tile; block: entries
    of a block, a multiple of 128 unless it is the whole pool; rows: query rows (tokens x heads) worked on at a time.
    trips: None, or a fixed number of entry blocks per tile: wrong results, but static cycle counts that mean something.
    """

    sequences: int
    tokens: int
    block: int
    rows: int
    trips: int | None = None


def default_config(chip: Chip, B: int, T: int, H: int, N: int) -> TpuConfig:
    """For B sequences of T tokens of H heads (a multiple of 8) and a pool of N entries each (0: none)."""
    block = min(N, MAX_BLOCK)
    if T <= DECODE_TOKENS:
        if chip.generation >= 7 and T * H <= NARROW_ROWS:
            block = min(N, MAX_NARROW_BLOCK)
        most = min(TARGET_ROWS // (T * H), B // chip.cores)  # no core without a sequence
        choices = (8, 4, 2, 1) if N <= MAX_BLOCK else (4, 2, 1)
        sequences = next(n for n in choices if n == 1 or (B % n == 0 and n <= most))
        return TpuConfig(sequences, T, block, _piece(T, H))
    tokens = max(8, min(LANES, 1 << (TARGET_ROWS // H).bit_length() - 1))
    return TpuConfig(1, tokens, block, _piece(tokens, H))


def _piece(tokens: int, H: int) -> int:
    """Query rows worked on at a time: those of the most tokens that divide a tile and stay within PIECE_ROWS."""
    return H * max(n for n in range(1, tokens + 1) if tokens % n == 0 and (n == 1 or n * H <= PIECE_ROWS))


def gather_is_faster(chip: Chip, T: int, H: int, D: int, N: int, C: int) -> bool:
    """Whether gathering C rows for each of T queries takes less time than reading all N entries under a mask."""
    row_seconds = 2 * D / chip.hbm_bytes_per_s
    product_seconds = 4 * H * D / (MXU_SHARE * chip.bf16_flops)  # one query's heads with one row, both products
    stream = N * max(row_seconds, T * product_seconds)
    gather = C * T * (max(GATHER_CYCLES / chip.clock_hz, 2 * row_seconds) + max(row_seconds, product_seconds))
    return gather < stream
