"""export: the official files of a converted checkpoint again, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from checkpoints.directories import new_directory
from checkpoints.errors import CheckpointError
from checkpoints.names import abstract_model, leaf_table
from checkpoints.shards import DTYPES, INDEX, write_shard
from checkpoints.source import MANIFEST, ORIGINALS, WEIGHTS, ConvertedSource, open_source, regions, stored_leaves

REGION_BYTES = 32 << 20  # held at a time


def export(
    src: str | Path, dst: str | Path, *, force: bool = False, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write the official files of a converted checkpoint again, byte for byte as they were.

    Args:
      progress: called with (bytes of tensors written, bytes in all).
    Raises:
      CheckpointError: `src` was not written by `convert`, or `dst` exists (and `force` is not given).
    """
    source = open_source(src)
    if not isinstance(source, ConvertedSource):
        raise CheckpointError(f"{src}: is not a converted checkpoint; export reads what `dsv4 convert` wrote")
    fetch = _fetcher(source, progress)
    with new_directory(Path(dst), force) as work:
        for header in sorted((source.path / ORIGINALS).glob("*.header")):
            write_shard(work / header.name.removesuffix(".header"), header.read_bytes(), fetch)
        for item in [*source.path.iterdir(), source.path / ORIGINALS / INDEX]:
            if item.name in (MANIFEST, WEIGHTS, ORIGINALS) or not item.exists():
                continue
            shutil.copytree(item, work / item.name) if item.is_dir() else shutil.copyfile(item, work / item.name)
    return Path(dst)


def _fetcher(
    source: ConvertedSource, progress: Callable[[int, int], None] | None
) -> Callable[[str], Iterator[np.ndarray]]:
    """Official name -> its rows, in its own dtype."""
    table = leaf_table(abstract_model(source.config))
    source.check(table)
    leaves = stored_leaves(source, table)
    places = {piece.name: (leaf, piece) for leaf in leaves.values() for piece in leaf.pieces}
    total = sum(DTYPES[leaf.official].itemsize * int(np.prod(leaf.shape)) for leaf in leaves.values())
    done = 0

    def fetch(name: str) -> Iterator[np.ndarray]:
        nonlocal done
        if name not in places:
            raise CheckpointError(f"{source.path}: has no tensor {name}, which the original files had")
        leaf, piece = places[name]
        for region in regions(leaf, piece, REGION_BYTES):
            rows = source.read(leaf, region)
            rows = rows.astype(DTYPES["I64"]) if leaf.official == "I64" else rows
            done += rows.nbytes
            yield rows
            if progress:
                progress(done, total)

    return fetch
