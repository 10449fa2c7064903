"""How an array lies on disk: Zarr v3 with its sharding codec, uncompressed, in the directory structure Orbax reads.

An array is cut into tiles, the least that a reader fetches, so small that each of eight devices can read its own rows
or columns. Files hold runs of whole tiles, row-major, and end with a table of where each tile begins; they are what a
conversion writes, checks and resumes by. Every size divides the array's, so that nothing is padded.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

SPLITS = 8  # ways that rows and columns can be split without reading a byte too much
LEAST_TILE, MOST_TILE = 16 << 10, 1 << 20  # bytes; smaller ones cost more to find than to read
FILE_BYTES = 256 << 20  # most tile bytes in one file
MANY_FILES = 64  # files this many times smaller are too many

Range = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """An array's shape and dtype, the shape of a tile, and the shape of what one file holds."""

    shape: tuple[int, ...]
    dtype: np.dtype
    tile: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def tiles_in_file(self) -> int:
        return math.prod(self.block) // max(math.prod(self.tile), 1)

    @property
    def file_bytes(self) -> int:
        """Tiles and their table; every file of the array has this size."""
        return math.prod(self.block) * self.dtype.itemsize + 16 * self.tiles_in_file

    def files(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name below the array's directory, position of its first element), in row-major order."""
        counts = [size // block for size, block in zip(self.shape, self.block, strict=True)]
        for place in itertools.product(*map(range, counts)):
            name = "/".join(["c", *map(str, place)])
            yield name, tuple(n * block for n, block in zip(place, self.block, strict=True))

    def bands(self, start: tuple[int, ...], limit: int) -> Iterator[tuple[tuple[int, ...], Range, Range]]:
        """What one file holds, in its order: (leading indices, rows, columns), each of about `limit` bytes at most.

        A band is whole rows of tiles. A vector counts as one row, a scalar as one element of it.
        """
        spans = list(zip(start, self.block, strict=True))
        *_, (row, rows), (column, columns) = [(0, 1), (0, 1), *spans]
        tile_rows = (1, 1, *self.tile)[-2]
        step = max(limit // (columns * self.dtype.itemsize * tile_rows), 1) * tile_rows
        for outer in itertools.product(*(range(first, first + count) for first, count in spans[:-2])):
            for begin in range(row, row + rows, step):
                yield outer, (begin, min(begin + step, row + rows)), (column, column + columns)

    def tiled(self, band: np.ndarray) -> np.ndarray:
        """A band [rows, columns] as its tiles [row of tiles, column of tiles, rows, columns]; a view."""
        rows, columns = (1, 1, *self.tile)[-2:]
        return band.reshape(len(band) // rows, rows, band.shape[1] // columns, columns).transpose(0, 2, 1, 3)

    def table(self) -> bytes:
        """The end of every file: offset and length of each tile, little-endian uint64."""
        size = math.prod(self.tile) * self.dtype.itemsize
        offsets = np.arange(self.tiles_in_file, dtype="<u8") * size
        return np.stack([offsets, np.full_like(offsets, size)], axis=1).tobytes()

    def metadata(self) -> bytes:
        """The array's zarr.json."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        plain = {"name": "bytes"} if self.dtype.itemsize == 1 else little
        sharding = {"chunk_shape": self.tile, "codecs": [plain], "index_codecs": [little], "index_location": "end"}
        fields = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.shape,
            "data_type": self.dtype.name,
            "fill_value": 0 if self.dtype.kind in "iu" else 0.0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.block}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        return json.dumps(fields).encode() + b"\n"


def cut(shape: tuple[int, ...], dtype: np.dtype) -> Layout:
    """Tiles and files of an array; leading axes (experts, gate and up) are never joined within a tile."""
    tile = _tile(shape, dtype.itemsize)
    block = list(tile)
    for axis in reversed(range(len(shape))):
        tiles = shape[axis] // tile[axis]
        room = FILE_BYTES // (math.prod(block) * dtype.itemsize)
        count = _divisor(tiles, room)
        if count * MANY_FILES < room:  # sizes with no fair divisor, a prime vocabulary: rather one large file
            count = tiles
        block[axis] *= count
        if count < tiles:
            break
    return Layout(shape, dtype, tile, tuple(block))


def _tile(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    *lead, rows, columns = (1, 1, *shape)
    r, c = rows // math.gcd(rows, SPLITS), columns // math.gcd(columns, SPLITS)
    while r * c * itemsize < LEAST_TILE and (r < rows or c < columns):  # join until worth a read of its own
        if c < columns and columns // c >= rows // r:
            c *= 2
        else:
            r *= 2
    r = _divisor(r, MOST_TILE // (c * itemsize))
    c = _divisor(c, MOST_TILE // (r * itemsize))
    return (*(1 for _ in lead), r, c)[len(lead) + 2 - len(shape) :]


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is no more than `most`, at least 1."""
    return next((d for d in range(min(number, most), 0, -1) if number % d == 0), 1)


def orbax_metadata(paths: Mapping[str, object] | list[str]) -> dict[str, bytes]:
    """The files by which Orbax knows a directory of such arrays as a pytree: a dict of path -> array."""
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree = {str((path,)): {"key_metadata": [{"key": path, "key_type": 2}], "value_metadata": value} for path in paths}
    structure = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    about: dict[str, object] = {
        "item_handlers": handler,
        "metrics": {},
        "performance_metrics": {},
        "custom_metadata": {},
    }
    about |= {"init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 0}  # the same bytes from the same source
    return {"_METADATA": json.dumps(structure).encode(), "_CHECKPOINT_METADATA": json.dumps(about).encode()}
