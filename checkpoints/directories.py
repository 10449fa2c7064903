"""New directories that appear whole or not at all, and files that survive a power cut."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from checkpoints.errors import CheckpointError

FLUSHERS = 16  # a file system commits files that are flushed at the same time together


@contextmanager
def new_directory(dst: Path, force: bool):
    """A fresh directory that becomes `dst` when the block ends well, and vanishes when it does not."""
    refuse_existing(dst, force)
    work = dst.parent / f".{dst.name}.{uuid.uuid4().hex[:8]}.partial"
    make_directory(work, dst)
    try:
        yield work
        replace(work, dst)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def refuse_existing(dst: Path, force: bool) -> None:
    if os.path.lexists(dst) and not force:
        raise CheckpointError(f"{dst}: exists; give another destination, or force (--force) to replace it")


def make_directory(work: Path, dst: Path) -> None:
    """Make `work`, beside `dst`, and what is above it."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{dst}: cannot be written ({error.strerror or error})") from error


def clear_replaced(dst: Path) -> None:
    """Remove what `dst` was before it was replaced, if a run stopped before it could."""
    _remove(_aside(dst))


def _aside(dst: Path) -> Path:
    return dst.parent / f".{dst.name}.replaced"


def replace(work: Path, dst: Path) -> None:
    """Give the finished `work` the name `dst`; one rename where `dst` is free, else the old one steps aside first."""
    if os.path.lexists(dst):
        clear_replaced(dst)
        os.replace(dst, _aside(dst))
    os.replace(work, dst)
    flush([dst.parent])
    clear_replaced(dst)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(paths: Iterable[Path]) -> None:
    """Have files and directories reach the disk."""
    with ThreadPoolExecutor(FLUSHERS) as pool:
        list(pool.map(_flush, paths))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
