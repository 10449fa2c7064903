"""Block sizes of the FP8 kernels by shape and chip."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.chips import Chip

LANES = 128
FEW_ROWS = 256  # up to here reading the weights takes longer than multiplying
ROW_ALIGN = 16  # rows of a 16-bit array that lie in one tile of memory
LARGE_TILE_BYTES = 4 << 20  # of a large weight's tiles: a step has some 1000 cycles of latency to hide
SMALL_BYTES, SMALL_TILES = 16 << 20, 2  # of a small weight, and its tiles for each core: few steps, not one alone
VMEM_SHARE = 0.5  # of the vector memory that a kernel may plan with
# Rows and columns of a tile with all channels at once: neither x nor sums need be fetched again for the next columns.
FOLDED = (1024, 1024), (1024, 512), (512, 1024), (512, 512), (512, 256)
WIDE, MAX_WIDE = 2048, 8192  # columns of a tile where it may be deep, and where there are few channels


@dataclass(frozen=True)
class TpuConfig:
    """Block sizes of the TPU kernel.

    rows: of x; columns: of the result, i.e. rows of w; channels: of the sum in one grid step; a multiple of 128 unless
    it is all of them.
    fold: weights are widened to bfloat16 with their scale before the product, which then may sum over all channels at
    once; else each 128 channels are summed by themselves, straight from the codes, and scaled afterwards.
    """

    rows: int
    columns: int
    channels: int
    fold: bool


def default_config(
    chip: Chip,
    rows: int,
    columns: int,
    channels: int,
    *,
    exact_scales: bool,
    unit: int = LANES,
    column_unit: int = LANES,
    groups: int = 1,
) -> TpuConfig:
    """For x [rows, channels] times w [columns, channels], in each of `groups` groups.

    exact_scales: scales are powers of two, so that they may be folded; unit, column_unit: channels and columns that
    must stay in one step.
    """
    if rows <= FEW_ROWS:
        return _few_rows(chip, rows, columns, channels, unit, column_unit, groups)
    # A matrix unit that sums over 256 channels is half idle on the 128 that share a scale.
    whole = columns % LANES == 0 and channels % LANES == 0
    fold = exact_scales and whole and chip.generation >= 6
    fits = lambda tall, wide: _folded_bytes(chip, tall, wide, channels, groups) <= VMEM_SHARE * chip.vmem_bytes
    for tall, wide in FOLDED if fold else ():
        tall, wide = min(tall, _align(rows, ROW_ALIGN)), column_tile(columns, wide, column_unit)
        if fits(tall, wide):
            return TpuConfig(tall, wide, channels, True)
    most, deep = (2048, 2048) if fold else (512, 1024)
    wide = column_tile(columns, most, column_unit)
    return TpuConfig(min(512, _align(rows, ROW_ALIGN)), wide, divisor(channels, deep, unit), fold)


def _folded_bytes(chip: Chip, rows: int, columns: int, channels: int, groups: int) -> int:
    """Of vector memory: two tiles each of x, of codes and of the result, its sums, and a tile of weights widened."""
    # Rotated rows have a place of their own; v6e's compiler holds x once more in any case.
    tiles_of_x = 2 + (groups > 1) + (not chip.has_fp8_mxu)
    return 2 * tiles_of_x * rows * channels + 4 * columns * channels + 8 * rows * columns


def _few_rows(
    chip: Chip, rows: int, columns: int, channels: int, unit: int, column_unit: int, groups: int
) -> TpuConfig:
    """Wide tiles rather than deep ones: the sums over 128 channels follow each other, those of columns do not."""
    size = groups * columns * channels
    if size <= SMALL_BYTES:
        most = max(column_unit, groups * columns // (SMALL_TILES * chip.cores))
        return TpuConfig(_align(rows, ROW_ALIGN), column_tile(columns, most, column_unit), channels, False)
    tile_bytes = LARGE_TILE_BYTES // chip.cores
    share = max(LANES, groups * columns // chip.cores)
    wide = column_tile(columns, min(WIDE, share), column_unit)
    deep = divisor(channels, max(LANES, tile_bytes // wide), unit)
    if deep == channels:
        wide = column_tile(columns, max(LANES, min(MAX_WIDE, share, tile_bytes // channels)), column_unit)
    return TpuConfig(_align(rows, ROW_ALIGN), wide, deep, False)


def column_tile(columns: int, most: int, unit: int = LANES) -> int:
    """A multiple of `unit`, itself of 128, that divides `columns`; where none does, one the last tile need not fill."""
    if columns % LANES:
        return min(_align(columns, LANES), most // LANES * LANES)
    return divisor(columns, most, unit)


def divisor(size: int, most: int, unit: int) -> int:
    """The largest multiple of `unit` up to `most` that divides `size`; where `unit` does not, all of `size`."""
    if size % unit:
        return size
    return max(n for n in range(unit, max(min(size, most), unit) + 1, unit) if size % n == 0)


def _align(size: int, unit: int) -> int:
    return -(-size // unit) * unit
