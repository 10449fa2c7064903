"""convert: official files to one Orbax directory, number formats kept; export: the same files back, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.names import Leaf, leaf_table
from checkpoints.shards import DTYPES, INDEX, write_shard
from checkpoints.source import (
    FORMAT,
    MANIFEST,
    ORIGINALS,
    WEIGHTS,
    ConvertedSource,
    OfficialSource,
    open_source,
    orbax,
    weight_files,
)
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import DeepseekV4

CARRIED = "carried."  # prefix of tensors kept for export alone
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def convert(src: str | Path, dst: str | Path, *, force: bool = False, progress: Progress | None = None) -> Path:
    """Write a converted checkpoint: Orbax in the stored formats, config and tokenizer files beside it.

    FP8 weights stay FP8 with their scales, FP4 stays packed; experts of a layer are stacked. The directory appears
    under its name only when it is whole.

    Raises:
      CheckpointError: `src` is not a sound official checkpoint, or `dst` exists (and `force` is not given).
    """
    source = open_source(src)
    if not isinstance(source, OfficialSource):
        raise CheckpointError(f"{src}: is a converted checkpoint already; give the official one")
    table = leaf_table(abstract_model(source.config))
    source.check(table)
    with new_directory(Path(dst), force) as work:
        tree = _stored_tree(source, table, progress)
        checkpointer, args = orbax()
        checkpointer.save(work.resolve() / WEIGHTS, args=args.PyTreeSave(tree))
        _keep_originals(source, work)
        _write_manifest(source, table, work)
    return Path(dst)


def _stored_tree(source: OfficialSource, table: dict[str, Leaf], progress: Progress | None) -> dict[str, np.ndarray]:
    total = sum(info.nbytes for info in source.reader.tensors.values())
    tree, done = {}, 0
    for path, leaf in table.items():
        tree[path] = source.stored(leaf)
        done += sum(source.reader.tensors[piece.name].nbytes for piece in leaf.pieces)
        if progress:
            progress(done, total)
    for name in source.carried():
        tree[CARRIED + name] = np.ascontiguousarray(source.reader.read(name)).reshape(-1).view(np.uint8)
        done += source.reader.tensors[name].nbytes
        if progress:
            progress(done, total)
    return tree


def _keep_originals(source: OfficialSource, work: Path) -> None:
    """Headers, index and every small file, so that export can give back the same bytes."""
    originals = work / ORIGINALS
    originals.mkdir()
    for file in source.reader.files:
        (originals / f"{file.name}.header").write_bytes(source.reader.header_bytes(file))
    for item in source.path.iterdir():
        if item.suffix == ".safetensors" or (item.name.startswith(".") and item.is_dir()):  # weights; hub caches
            continue
        target = originals / item.name if item.name == INDEX else work / item.name
        shutil.copytree(item, target) if item.is_dir() else shutil.copyfile(item, target)


def _write_manifest(source: OfficialSource, table: dict[str, Leaf], work: Path) -> None:
    formats = asdict(source.config.quantization) if source.config.quantization else {}
    formats.pop("block", None)
    leaves = {path: {"dtype": leaf.stored.name, "shape": list(leaf.shape)} for path, leaf in table.items()}
    manifest = {
        "format": FORMAT,
        "complete": True,
        "quantization": formats,
        "carried": source.carried(),
        "leaves": leaves,
        "files": weight_files(work),
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def export(src: str | Path, dst: str | Path, *, force: bool = False) -> Path:
    """Write the official files of a converted checkpoint again, byte for byte as they were.

    Raises:
      CheckpointError: `src` was not written by `convert`, or `dst` exists (and `force` is not given).
    """
    source = open_source(src)
    if not isinstance(source, ConvertedSource):
        raise CheckpointError(f"{src}: is not a converted checkpoint; export reads what `dsv4 convert` wrote")
    table = leaf_table(abstract_model(source.config))
    source.check(table)
    with new_directory(Path(dst), force) as work:
        fetch = _fetcher(source, table)
        headers = sorted((source.path / ORIGINALS).glob("*.header"))
        for header in headers:
            write_shard(work / header.name.removesuffix(".header"), header.read_bytes(), fetch)
        for item in [*source.path.iterdir(), source.path / ORIGINALS / INDEX]:
            if item.name in (MANIFEST, WEIGHTS, ORIGINALS) or not item.exists():
                continue
            shutil.copytree(item, work / item.name) if item.is_dir() else shutil.copyfile(item, work / item.name)
    return Path(dst)


def _fetcher(source: ConvertedSource, table: dict[str, Leaf]) -> Callable[[str], np.ndarray]:
    """Official name -> its array; a stacked leaf is read once for the run of its pieces."""
    places = {piece.name: (path, piece.index) for path, leaf in table.items() for piece in leaf.pieces}
    carried = {name: (CARRIED + name, ()) for name in source.manifest["carried"]}
    held: dict[str, np.ndarray] = {}

    def fetch(name: str) -> np.ndarray:
        try:
            path, index = places.get(name) or carried[name]
        except KeyError:
            raise CheckpointError(f"{source.path}: has no tensor {name}, which the original files had") from None
        if path not in held:
            if len(held) > 16:
                held.pop(next(iter(held)))
            stored = table[path].stored if path in table else np.dtype(np.uint8)
            held[path] = source.restore({path: jax.ShapeDtypeStruct((), stored)})[path]
        array = held[path][index]
        return array.astype(DTYPES["I64"]) if path in table and table[path].official == "I64" else array

    return fetch


def abstract_model(config: ModelConfig) -> DeepseekV4:
    """The model's shapes, in the formats a checkpoint stores; nothing is allocated."""
    return jax.eval_shape(lambda: DeepseekV4(config, max_tokens=1, dtype=ml_dtypes.bfloat16))


@contextmanager
def new_directory(dst: Path, force: bool):
    """A fresh directory that becomes `dst` when the block ends well, and vanishes when it does not."""
    if dst.exists() and not force:
        raise CheckpointError(f"{dst}: exists; give another destination, or force (--force) to replace it")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        work = dst.parent / f".{dst.name}.{uuid.uuid4().hex[:8]}.partial"
        work.mkdir()
    except OSError as error:
        raise CheckpointError(f"{dst}: cannot be written ({error.strerror or error})") from error
    try:
        yield work
        replaced = dst.parent / f".{dst.name}.{uuid.uuid4().hex[:8]}.replaced"
        if dst.exists():
            os.replace(dst, replaced)
        os.replace(work, dst)
        if replaced.exists():
            shutil.rmtree(replaced) if replaced.is_dir() else replaced.unlink()
    finally:
        shutil.rmtree(work, ignore_errors=True)
