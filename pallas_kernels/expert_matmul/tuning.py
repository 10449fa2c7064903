"""Block sizes of the experts' kernels by shape and chip."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.chips import Chip
from pallas_kernels.fp8_matmul.tuning import LANES, divisor

FEW_ROWS = 8  # of a block, up to which a product for each group of channels costs less than scaling the weights
MAX_WIDE_BYTES = 8 << 20  # of weights widened for one product
SPAN = 2 * LANES  # columns of the smallest tile whose rows may all be held
STEP_CYCLES = 2600  # that reading a tile takes: a step has some 1000 cycles of latency to hide


@dataclass(frozen=True)
class TpuConfig:
    """Block sizes of the TPU kernel.

    columns: of the result, i.e. rows of w, in one grid step; a multiple of 128 that divides N.
    fold: weights are widened to bfloat16 with their scale before the product; else each group of channels that shares
    a scale is summed by itself, straight from the codes, and scaled afterwards.
    """

    columns: int
    fold: bool


def default_config(
    chip: Chip, rows: int, N: int, K: int, *, packed: bool, exact_scales: bool, stacks: int = 1
) -> TpuConfig:
    """For blocks of `rows` rows with w [N, K]; exact_scales: they are powers of two, so that they may be folded.

    stacks: a tile lies in one of so many equal parts of N, if those are large enough for any tile.
    """
    fold = rows > FEW_ROWS and (packed or (exact_scales and chip.generation >= 6))
    row_bytes = K // 2 if packed else K
    most = int(STEP_CYCLES * chip.hbm_bytes_per_s / chip.clock_hz) // row_bytes
    if fold:
        most = min(most, MAX_WIDE_BYTES // (2 * K))
    part = N if N % (stacks * SPAN) else N // stacks
    return TpuConfig(divisor(part, max(LANES, min(most, N // chip.cores)), LANES), fold)
