"""verify: a checkpoint against its own manifest and config, and against the one it was made from."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.journal import file_digest
from checkpoints.names import Leaf, abstract_model, leaf_table
from checkpoints.source import (
    MANIFEST,
    WEIGHTS,
    ConvertedSource,
    Source,
    check_scales,
    open_source,
    regions,
    stored_leaves,
    weight_files,
)

REGION_BYTES = 8 << 20  # of one tensor, read at a time by each worker


@dataclass(frozen=True)
class Verification:
    """What was checked and found sound: files by digest, tensors by bits (against a source) or by form."""

    path: str
    against: str | None
    files: int
    tensors: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class VerificationError(CheckpointError):
    """What is wrong with a checkpoint; `problems` has a line for each finding."""

    def __init__(self, problems: list[str]):
        super().__init__(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
        self.problems = problems


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check a checkpoint, official or converted, whole.

    Every tensor that the config asks for is there, with its dtype and shape, and no other; block scales are finite and
    in range; expert ids are experts. Of a converted one, every file has the size and SHA-256 of the manifest and every
    array the dtype and shape. `against` another checkpoint, usually the source: every tensor has the same bits.
    Everything is streamed: a worker (default: one a core, at most 8) holds a few MiB.

    Raises:
      VerificationError: a CheckpointError whose `problems` lists everything found.
      CheckpointError: a directory that is no checkpoint at all, or whose tensors do not fit its config.
    """
    source, other = open_source(path), None if against is None else open_source(against)
    leaves = _leaves(source)
    problems: list[str] = []
    if other is not None:
        problems += _differences(source, leaves, other, _leaves(other))
    if isinstance(source, ConvertedSource):
        problems += _other_files(source)
    if not problems:
        check = _Checker(source, other, sum(map(_nbytes, leaves.values())), progress)
        with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
            problems += [problem for found in pool.map(check, leaves.values()) for problem in found]
    if problems:
        raise VerificationError(problems)
    files = len(source.manifest["files"]) if isinstance(source, ConvertedSource) else 0
    tensors, nbytes = sum(len(leaf.pieces) for leaf in leaves.values()), sum(map(_nbytes, leaves.values()))
    return Verification(str(path), None if against is None else str(against), files, tensors, nbytes)


def _leaves(source: Source) -> dict[str, Leaf]:
    table = leaf_table(abstract_model(source.config))
    source.check(table)
    return stored_leaves(source, table)


def _nbytes(leaf: Leaf) -> int:
    return math.prod(leaf.shape) * leaf.stored.itemsize


def _differences(source: Source, leaves: dict[str, Leaf], other: Source, others: dict[str, Leaf]) -> list[str]:
    """Leaves that only one of two checkpoints has, or that they store differently."""
    found = [f"{source.path}: has {name}, {other.path} has not" for name in sorted(set(leaves) - set(others))]
    found += [f"{other.path}: has {name}, {source.path} has not" for name in sorted(set(others) - set(leaves))]
    for path in sorted(set(leaves) & set(others)):
        mine, its = ((leaf.official, list(leaf.shape)) for leaf in (leaves[path], others[path]))
        if mine != its:
            found.append(f"{source.path}: {path} is {mine[0]} {mine[1]}, {its[0]} {its[1]} in {other.path}")
    return found


def _other_files(source: ConvertedSource) -> Iterator[str]:
    """Files without tensors, by digest, and weight files that the manifest does not know."""
    files = source.manifest["files"]
    for name in sorted(set(weight_files(source.path)) - set(files)):
        yield f"{source.path / name}: not in {MANIFEST}; remove it"
    for name in files:
        if not _is_tiles(name):
            yield from _digest_problem(source, name)


def _is_tiles(name: str) -> bool:
    """Whether a file is of those that hold tiles: weights/PATH/c/..."""
    return name.startswith(f"{WEIGHTS}/") and "/c" in name.removeprefix(f"{WEIGHTS}/")


def _digest_problem(source: ConvertedSource, name: str) -> Iterator[str]:
    path, facts = source.path / name, source.manifest["files"][name]
    if not path.is_file():
        yield f"{path}: missing"
    elif file_digest(path) != facts["sha256"]:
        yield f"{path}: not what was written (SHA-256 differs from {MANIFEST})"


class _Checker:
    """Checks a leaf: its files, its array, its values; gives the problems."""

    def __init__(self, source: Source, other: Source | None, total: int, progress: Callable[[int, int], None] | None):
        self.source, self.other, self.total, self.progress = source, other, total, progress
        self.done, self.lock = 0, threading.Lock()
        self.files: dict[str, list[str]] = {}
        if isinstance(source, ConvertedSource):
            for name in filter(_is_tiles, source.manifest["files"]):
                self.files.setdefault(name.removeprefix(f"{WEIGHTS}/").split("/")[0], []).append(name)

    def __call__(self, leaf: Leaf) -> list[str]:
        try:
            return list(self.problems(leaf))
        except CheckpointError as error:
            return [str(error)]
        finally:
            self.tick(_nbytes(leaf))

    def problems(self, leaf: Leaf) -> Iterator[str]:
        if isinstance(self.source, ConvertedSource):
            for name in self.files.get(leaf.path, []):
                yield from _digest_problem(self.source, name)
            form = self.source.form(leaf.path)
            if form != (leaf.stored, leaf.shape):
                yield f"{self.source.path / WEIGHTS / leaf.path}: holds {form[0]} {list(form[1])}, not {leaf.stored}"
                return
        if self.other is None and not leaf.is_block_scale and leaf.official != "I64":
            return
        for piece in leaf.pieces:
            yield from self.values(leaf, piece)

    def values(self, leaf: Leaf, piece) -> Iterator[str]:
        """Scales in range, and the same bits as the other checkpoint's; one problem a tensor is enough."""
        for region in regions(leaf, piece, REGION_BYTES):
            mine = self.source.read(leaf, region)
            if leaf.is_block_scale:
                check_scales(mine, f"{self.source.path}: {piece.name}")
            if leaf.official == "I64" and mine.size and not 0 <= mine.min() <= mine.max() < self._experts:
                yield f"{self.source.path}: {piece.name} holds expert ids {mine.min()} .. {mine.max()}"
                return
            if self.other is not None:
                its = self.other.read(leaf, region)
                if not np.array_equal(_bits(mine), _bits(its)):
                    yield f"{self.source.path}: {piece.name} differs from {self.other.path}"
                    return

    @property
    def _experts(self) -> int:
        return self.source.config.n_routed_experts

    def tick(self, count: int) -> None:
        with self.lock:
            self.done += count
            if self.progress:
                self.progress(self.done, self.total)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")
