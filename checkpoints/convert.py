"""convert: official files to one Orbax directory, number formats kept, streamed, resumable, in bounded memory.

The destination is planned first: every file, its size and what it is made of. Workers then write file after file, each
from mapped shards through one small buffer, under a temporary name; a journal beside the unfinished directory gets a
line for each that is done. Whatever stops the process, the same command takes up the journal, checks the digests of
what it lists, and writes the rest. The directory gets its name by one rename, after its manifest and every byte are on
disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.directories import clear_replaced, flush, make_directory, new_directory, refuse_existing, replace
from checkpoints.errors import CheckpointError
from checkpoints.journal import Entry, Journal, file_digest, read_entries
from checkpoints.layout import Layout, cut, orbax_metadata
from checkpoints.names import Leaf, abstract_model, leaf_table
from checkpoints.shards import DTYPES, INDEX
from checkpoints.source import (
    FORMAT,
    MANIFEST,
    ORIGINALS,
    WEIGHTS,
    ConvertedSource,
    OfficialSource,
    open_source,
    stored_leaves,
)

__all__ = ["PlannedFile", "Plan", "abstract_model", "convert", "new_directory", "plan"]

Progress = Callable[[int, int], None]  # bytes done, bytes in all
MAX_MEMORY = 2 << 30
MOST_BAND = 32 << 20  # bytes a worker holds; more does not make it faster
LEAST_FLUSH = 1 << 20  # files from this size on are flushed by their worker, smaller ones together at the end
SPARE_BYTES = 16 << 20  # of disk, for configs, headers, directories
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class PlannedFile:
    """One file of the destination's weights: a block of an array. `origin` digests all that its bytes follow from."""

    name: str
    leaf: Leaf
    layout: Layout
    start: tuple[int, ...]
    origin: str

    @property
    def source_bytes(self) -> int:
        return math.prod(self.layout.block) * DTYPES[self.leaf.official].itemsize


@dataclass(frozen=True)
class Plan:
    """What a conversion will write; nothing is written yet.

    disk_bytes is still needed, with what an interrupted run has finished left out; disk_free is at the destination.
    """

    source: OfficialSource
    dst: Path
    table: dict[str, Leaf]
    layouts: dict[str, Layout]
    files: list[PlannedFile]
    disk_bytes: int
    disk_free: int

    @property
    def source_bytes(self) -> int:
        return sum(file.source_bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Leaves with dtype, shape, bytes, files, and how many ways each axis may be sharded without excess reading."""
        leaves = {}
        for path, layout in self.layouts.items():
            splits = [size // tile for size, tile in zip(layout.shape, layout.tile, strict=True)]
            count = math.prod(layout.shape) // max(math.prod(layout.block), 1)
            sizes = {"dtype": layout.dtype.name, "shape": list(layout.shape), "bytes": layout.nbytes, "files": count}
            leaves[path] = sizes | {"splits": splits}
        total = sum(layout.nbytes for layout in self.layouts.values())
        disk = {"disk_bytes": self.disk_bytes, "disk_free": self.disk_free, "fits": self.disk_bytes <= self.disk_free}
        return {"bytes": total, "files": len(self.files), **disk, "leaves": leaves}


def plan(src: str | Path, dst: str | Path) -> Plan:
    """Everything `convert(src, dst)` would write, after the checks that need no weights.

    Raises:
      CheckpointError: `src` is not a sound official checkpoint.
    """
    source, dst = open_source(src), Path(dst)
    if not isinstance(source, OfficialSource):
        raise CheckpointError(f"{src}: is a converted checkpoint already; give the official one")
    table = leaf_table(abstract_model(source.config))
    source.check(table)
    leaves = stored_leaves(source, table)
    layouts = {path: cut(leaf.shape, leaf.stored) for path, leaf in leaves.items()}
    files = _in_source_order(source, _planned_files(source, leaves, layouts))
    finished = _finished_bytes(dst)
    needed = sum(file.layout.file_bytes for file in files if (file.name, file.origin) not in finished)
    above = next(p for p in (dst.absolute().parent, *dst.absolute().parent.parents) if p.exists())
    return Plan(source, dst, table, layouts, files, needed + SPARE_BYTES, shutil.disk_usage(above).free)


def _planned_files(source: OfficialSource, leaves: Mapping[str, Leaf], layouts: Mapping[str, Layout]):
    stamps = {file: _stamp(source, file) for file in source.reader.files}
    for path, leaf in leaves.items():
        layout = layouts[path]
        made_of = sorted(stamps[file] for file in {source.reader.tensors[piece.name].file for piece in leaf.pieces})
        facts = [FORMAT, path, leaf.official, layout.shape, layout.tile, layout.block, made_of]
        origin = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        for name, start in layout.files():
            yield PlannedFile(f"{WEIGHTS}/{path}/{name}", leaf, layout, start, origin)


def _stamp(source: OfficialSource, file: Path) -> str:
    """Changes when a shard does, for all that can be told without reading its weights."""
    about, header = file.stat(), hashlib.sha256(source.reader.header_bytes(file)).hexdigest()
    return f"{file.name} {about.st_size} {about.st_mtime_ns} {header}"


def _in_source_order(source: OfficialSource, files: Iterable[PlannedFile]) -> list[PlannedFile]:
    """Shards are read once from front to back, more or less: experts are interleaved there."""

    def place(file: PlannedFile):
        stacked = len(file.leaf.pieces[0].index)
        first = source.reader.tensors[file.leaf.names[file.start[:stacked]]]
        return first.file, first.offset + (file.start[-2] if len(file.start) > 1 and not stacked else 0)

    return sorted(files, key=place)


def _work(dst: Path) -> Path:
    return dst.parent / f".{dst.name}.partial"


def _journal(dst: Path) -> Path:
    return dst.parent / f".{dst.name}.journal"


def _finished_bytes(dst: Path) -> set[tuple[str, str]]:
    """(name, origin) of files that an interrupted conversion to `dst` has finished."""
    if not _journal(dst).is_file():
        return set()
    entries = read_entries(_journal(dst).read_bytes()).values()
    return {(entry.file, entry.origin) for entry in entries if (_work(dst) / entry.file).is_file()}


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    max_memory: int = MAX_MEMORY,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a converted checkpoint: Orbax in the stored formats, config and tokenizer files beside it.

    FP8 weights stay FP8 with their scales, FP4 stays packed; experts of a layer are stacked. The directory appears
    under its name only when it is whole. After an interruption the same call finishes the work; files already finished
    are checked, not written again. A destination that holds this very conversion is left as it is.

    Args:
      max_memory: most bytes to work in, on top of what the process holds already and of the page cache.
      workers: files written at a time; default two a core, at least 4 and at most 16.
      force: replace `dst` if it exists; it stays until its successor is whole.
      progress: called with (bytes of the source done, bytes in all), from any thread, one call at a time.
    Raises:
      CheckpointError: `src` is not a sound official checkpoint; `dst` exists (and `force` is not given), cannot be
        written, or has too little space; `max_memory` is too little. What was finished is kept.
    """
    dst = Path(dst)
    planned = plan(src, dst)
    if not force and _is_done(planned):
        clear_replaced(dst)
        _journal(dst).unlink(missing_ok=True)
        return dst
    refuse_existing(dst, force)
    count, band_bytes = _share_memory(planned, max_memory, workers)
    _refuse_strange_work(dst)
    make_directory(_work(dst), dst)
    _refuse_small_disk(planned)
    try:
        with contextlib.closing(Journal(_journal(dst))) as journal:
            (_work(dst) / MANIFEST).unlink(missing_ok=True)  # of a run stopped just before the rename
            _write_files(planned, journal, count, band_bytes, progress)
            _finish(planned, _work(dst), journal.entries)
            replace(_work(dst), dst)
            _journal(dst).unlink()
    except OSError as error:
        raise _unwritable(dst, error) from error
    return dst


def _refuse_small_disk(planned: Plan) -> None:
    if planned.disk_bytes <= planned.disk_free:
        return
    with contextlib.suppress(OSError):
        _work(planned.dst).rmdir()  # unless an earlier run has left something in it
    need, free = (f"{amount / 2**30:,.2f} GiB" for amount in (planned.disk_bytes, planned.disk_free))
    raise CheckpointError(f"{planned.dst}: needs {need} of disk, {free} are free; make room or choose another disk")


def _unwritable(dst: Path, error: OSError) -> CheckpointError:
    if error.errno in FULL:
        return CheckpointError(
            f"{dst}: disk full ({error.strerror}); finished files are kept, make room and run the same command again"
        )
    return CheckpointError(f"{dst}: cannot be written ({error.strerror or error}); finished files are kept")


def _is_done(planned: Plan) -> bool:
    """Whether the destination is this conversion already, finished."""
    if not (planned.dst / MANIFEST).is_file():
        return False
    try:
        return ConvertedSource(planned.dst).manifest.get("source") == _fingerprint(planned)
    except CheckpointError:
        return False


def _fingerprint(planned: Plan) -> str:
    """Digest of all that the converted files follow from."""
    facts = [sorted({file.origin for file in planned.files}), planned.source.fields]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _refuse_strange_work(dst: Path) -> None:
    work = _work(dst)
    if not _journal(dst).exists() and work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise CheckpointError(f"{work}: is in the way, and not of an interrupted conversion; remove it")


def _share_memory(planned: Plan, max_memory: int, workers: int | None) -> tuple[int, int]:
    """(workers, bytes of a band) that keep the conversion below `max_memory`."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    count = workers or min(2 * max(os.cpu_count() or 1, 2), 16)  # while some wait for the disk, others compute
    least = max(_least_band(layout) for layout in planned.layouts.values())
    share = max_memory // 3  # a band in the buffer, what checks and casts make of it, and reserve
    if share < least:
        need = math.ceil(3 * least / 2**20)
        raise CheckpointError(f"max_memory={max_memory} is too little: this conversion needs {need} MiB at least")
    count = min(count, share // least)
    return count, max(min(share // count, MOST_BAND), least)


def _least_band(layout: Layout) -> int:
    rows, columns = (1, 1, *layout.tile)[-2], (1, 1, *layout.block)[-1]
    return rows * columns * layout.dtype.itemsize


def _write_files(planned: Plan, journal: Journal, workers: int, band_bytes: int, progress: Progress | None) -> None:
    writer = _Writer(planned, journal, band_bytes, workers, progress)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(writer.finish, file) for file in planned.files]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                if not future.cancelled():
                    future.result()
        finally:
            writer.stopped.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Another file failed; this one need not be finished."""


class _Writer:
    """Writes planned files, several at a time, each through a buffer of its own."""

    def __init__(self, planned: Plan, journal: Journal, band_bytes: int, workers: int, progress: Progress | None):
        self.source, self.work, self.journal = planned.source, _work(planned.dst), journal
        self.band_bytes, self.progress = band_bytes, progress
        self.stopped = threading.Event()
        self.done, self.total, self.lock = 0, planned.source_bytes, threading.Lock()
        self.buffers: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        for _ in range(workers):
            self.buffers.put(None)  # made when first used

    def finish(self, file: PlannedFile) -> None:
        """Write one file and its line of the journal, unless both are there already and sound."""
        path, entry = self.work / file.name, self.journal.entries.get(file.name)
        if entry and entry.origin == file.origin and path.is_file() and path.stat().st_size == entry.bytes:
            if file_digest(path) == entry.sha256:
                self.tick(file.source_bytes)
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".partial")
        buffer = self.buffers.get()
        if buffer is None:
            buffer = np.empty(self.band_bytes, np.uint8)
        try:
            digest = self.write(file, unfinished, buffer)
        finally:
            self.buffers.put(buffer)
        os.replace(unfinished, path)
        self.journal.add(Entry(file.name, file.layout.file_bytes, digest, file.origin))

    def write(self, file: PlannedFile, path: Path, buffer: np.ndarray) -> str:
        """Stream one file; its SHA-256."""
        layout, digest = file.layout, hashlib.sha256()
        itemsize = DTYPES[file.leaf.official].itemsize
        with open(path, "wb") as out:
            for place in layout.bands(file.start, self.band_bytes):
                if self.stopped.is_set():
                    raise _Stopped
                band = self.source.band(file.leaf, *place)
                data = tile_bytes(layout, band, buffer)
                digest.update(data)
                out.write(data)
                self.tick(band.size * itemsize)
            digest.update(layout.table())
            out.write(layout.table())
            out.flush()
            if layout.file_bytes >= LEAST_FLUSH:
                os.fsync(out.fileno())
        return digest.hexdigest()

    def tick(self, count: int) -> None:
        with self.lock:
            self.done += count
            if self.progress:
                self.progress(self.done, self.total)


def tile_bytes(layout: Layout, band: np.ndarray, buffer: np.ndarray) -> memoryview:
    """A band in the order of its tiles, in `buffer` unless it lies in that order already."""
    words = band.view(f"u{band.dtype.itemsize}")
    tiles = layout.tiled(words)
    if tiles.shape[1] > 1 or not words.flags.c_contiguous:
        packed = buffer[: words.nbytes].view(words.dtype).reshape(tiles.shape)
        np.copyto(packed, tiles)
        words = packed
    return words.reshape(-1).view(np.uint8).data


def _finish(planned: Plan, work: Path, entries: Mapping[str, Entry]) -> None:
    """Everything that is not weights, then the manifest; all of it on disk when this returns."""
    known = {file.name: entries[file.name] for file in planned.files}
    small = {f"{WEIGHTS}/{name}": content for name, content in orbax_metadata(list(planned.layouts)).items()}
    small |= {f"{WEIGHTS}/{path}/zarr.json": layout.metadata() for path, layout in planned.layouts.items()}
    for name, content in small.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content)
    small_names = [*small, *_keep_originals(planned.source, work)]
    sizes = {name: entry.bytes for name, entry in known.items()} | {n: (work / n).stat().st_size for n in small_names}
    digests = {name: entry.sha256 for name, entry in known.items()} | {n: file_digest(work / n) for n in small_names}
    files = {name: {"bytes": size, "sha256": digests[name]} for name, size in sizes.items()}
    for path in [p for p in work.rglob("*") if p.is_file()]:
        if path.relative_to(work).as_posix() not in files:  # left by a run that was stopped
            path.unlink()
    flush(work / name for name, size in sizes.items() if size < LEAST_FLUSH)
    flush(path for path in (work, *work.rglob("*")) if path.is_dir())
    _write_manifest(planned, work, files)


def _keep_originals(source: OfficialSource, work: Path) -> list[str]:
    """Headers, index and every small file, so that export can give back the same bytes; their names in `work`."""
    originals = work / ORIGINALS
    originals.mkdir(exist_ok=True)
    names = []
    for file in source.reader.files:
        (originals / f"{file.name}.header").write_bytes(source.reader.header_bytes(file))
        names.append(f"{ORIGINALS}/{file.name}.header")
    for item in small_files(source.path):
        name = item.relative_to(source.path).as_posix()
        if name.split("/")[0] in (MANIFEST, WEIGHTS, ORIGINALS):
            raise CheckpointError(f"{item}: has a name that a converted checkpoint needs; rename or remove it")
        name = f"{ORIGINALS}/{name}" if name == INDEX else name
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(item, work / name)
        names.append(name)
    return names


def small_files(directory: Path) -> list[Path]:
    """Every file of an official checkpoint but its weights and what hub tools keep in hidden directories."""
    found: list[Path] = []
    for item in sorted(directory.iterdir()):
        if item.is_dir() and not item.name.startswith("."):
            found += [file for file in sorted(item.rglob("*")) if file.is_file()]
        elif item.is_file() and item.suffix != ".safetensors":
            found.append(item)
    return found


def _write_manifest(planned: Plan, work: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    source = planned.source
    formats = asdict(source.config.quantization) if source.config.quantization else {}
    formats.pop("block", None)
    leaves = {path: {"dtype": leaf.stored.name, "shape": list(leaf.shape)} for path, leaf in planned.table.items()}
    manifest = {
        "format": FORMAT,
        "complete": True,
        "source": _fingerprint(planned),
        "quantization": formats,
        "carried": source.carried(),
        "leaves": leaves,
        "files": dict(sorted(files.items())),
    }
    unfinished = work / f"{MANIFEST}.partial"
    unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
    flush([unfinished])
    os.replace(unfinished, work / MANIFEST)
    flush([work])
