"""Safetensors files: a reader that trusts nothing it reads, and a writer for the same layout.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, data_offsets) and the tensors' bytes. The
format's own numpy front end knows neither bfloat16 nor fp8, and re-export has to keep headers to the byte.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
MAX_HEADER = 100 << 20  # the format's own limit
MAX_RANK = 64  # numpy's own limit


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file; offset counts from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class ShardReader:
    """Every tensor of a checkpoint directory, by name; headers are checked at once, bytes are mapped on demand."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.files = _shard_files(self.directory)
        self._headers: dict[Path, bytes] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            self._headers[file], infos = read_header(file)
            for info in infos:
                if info.name in self.tensors:
                    other = self.tensors[info.name].file.name
                    raise CheckpointError(f"{file}: tensor {info.name} is also in {other}; remove one of the two files")
                self.tensors[info.name] = info
        _check_index(self.directory, self.tensors)

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the file's bytes; nothing is copied."""
        info = self.tensors[name]
        if not info.nbytes:
            return np.empty(info.shape, DTYPES[info.dtype])
        raw = np.frombuffer(self._map(info.file), np.uint8, info.nbytes, info.offset)
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)

    def header_bytes(self, file: Path) -> bytes:
        """A file's length field and JSON header as they are."""
        return self._headers[file]

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with open(file, "rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def read_header(file: Path) -> tuple[bytes, list[TensorInfo]]:
    """The raw header of one file and the tensors it lists, each checked against the file's size."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            prefix = handle.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{file}: truncated or not a safetensors file ({size} bytes); download it again")
            header = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    return prefix + header, parse_header(header, file, size)


def parse_header(header: bytes, file: Path, size: int) -> list[TensorInfo]:
    """Tensors of a JSON header; they must tile the rest of the file's `size` bytes without gap or overlap."""
    try:
        fields = json.loads(header, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is not valid JSON ({error}); download it again") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: its header is not a JSON object; download it again")
    fields.pop("__metadata__", None)
    start = 8 + len(header)
    infos = sorted((_tensor_info(n, f, file, start) for n, f in fields.items()), key=lambda i: (i.offset, i.nbytes))
    end = start
    for info in infos:
        if info.offset != end:
            raise CheckpointError(f"{file}: tensor {info.name} starts at byte {info.offset}, expected {end}")
        end += info.nbytes
    if end != size:
        what = "truncated; download it again" if end > size else "longer than its header says"
        raise CheckpointError(f"{file}: {size} bytes where its header asks for {end}; {what}")
    return infos


def _tensor_info(name: str, fields, file: Path, start: int) -> TensorInfo:
    def fail(why: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {name if name.isprintable() else ascii(name)}: {why}")

    if not name.isprintable():  # lone surrogates cannot be printed at all, control characters should not be
        raise fail("its name has unprintable characters; download the file again")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise fail("its entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(f"dtype {dtype!r} is not supported; known: {', '.join(sorted(DTYPES))}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise fail(f"shape {shape!r} and data_offsets {offsets!r} must be lists of non-negative integers")
    if len(shape) > MAX_RANK:
        raise fail(f"its shape has {len(shape)} dimensions, more than the {MAX_RANK} of an array")
    # An empty tensor may still have sides that no array can have.
    if math.prod(max(side, 1) for side in shape) * DTYPES[dtype].itemsize >= 1 << 63:
        raise fail(f"shape {shape!r} is larger than any array")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise fail(f"{dtype} {shape} needs {nbytes} bytes, data_offsets {offsets} hold {offsets[1] - offsets[0]}")
    return TensorInfo(name, dtype, tuple(shape), file, start + offsets[0], nbytes)


def _naturals(value) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key appears twice")
    return fields


def _shard_files(directory: Path) -> list[Path]:
    """The files that the index names, or, without an index, all of them."""
    weight_map = _weight_map(directory)
    names = sorted(set(weight_map.values())) if weight_map is not None else None
    if names is None:
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory}: no *.safetensors files")
        return files
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{directory / INDEX}: shard {name!r} is not a plain file name")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / INDEX}: names shard {name}, which is missing; download it")
    return [directory / name for name in names]


def _weight_map(directory: Path) -> dict[str, str] | None:
    file = directory / INDEX
    if not file.exists():
        return None
    try:
        weight_map = json.loads(file.read_text(), object_pairs_hook=_no_duplicates)["weight_map"]
        if not all(key.isprintable() and value.isprintable() for key, value in weight_map.items()):
            raise ValueError("a name has unprintable characters")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: no readable weight_map of tensor -> file ({error!r})") from None
    return weight_map


def _check_index(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    weight_map = _weight_map(directory)
    if weight_map is None:
        return
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{directory / INDEX}: tensor {name} is not in {file}; download that shard again")
    extra = sorted(set(tensors) - set(weight_map))
    if extra:
        raise CheckpointError(f"{tensors[extra[0]].file}: tensor {extra[0]} is not in {INDEX}")


def make_header(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> bytes:
    """Length field and JSON header for tensors (dtype, shape) laid out in order, padded to 8 bytes."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(file: Path, header: bytes, fetch: Callable[[str], np.ndarray | Iterator[np.ndarray]]) -> None:
    """Write a file with exactly this header, tensor by tensor; it appears under its name only when whole.

    `fetch` may give the raw bytes (uint8) of a tensor, or its rows in several arrays; an array must have the header's
    dtype and shape.
    """
    fields = json.loads(header[8:])
    fields.pop("__metadata__", None)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "wb") as out:
            out.write(header)
            for name, entry in sorted(fields.items(), key=lambda item: item[1]["data_offsets"]):
                _write_tensor(out, fetch(name), entry, f"{file}: tensor {name}")
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _write_tensor(out: BinaryIO, value: np.ndarray | Iterator[np.ndarray], entry, where: str) -> None:
    if isinstance(value, np.ndarray):
        out.write(_raw(value, entry, where))
        return
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    written = sum(out.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data) for rows in value)
    if written != size:
        raise CheckpointError(f"{where} has {written} bytes, its header says {size}")


def _raw(array: np.ndarray, entry, where: str) -> memoryview:
    """An array's bytes, if they are what the header's entry announces."""
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    if array.nbytes != size:
        raise CheckpointError(f"{where} has {array.nbytes} bytes, its header says {size}")
    if array.dtype != np.uint8 and (array.dtype, list(array.shape)) != (DTYPES[entry["dtype"]], entry["shape"]):
        raise CheckpointError(
            f"{where} is {array.dtype} {list(array.shape)}, its header says {entry['dtype']} {entry['shape']}"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    fetch: Callable[[str], np.ndarray],
    *,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write `model-0000x-of-0000y.safetensors` and their index; one tensor at a time is in memory.

    Args:
      tensors: name -> (dtype, shape), in the order they are written.
      fetch: gives the array of a name.
      shard_bytes: a shard is closed before it would grow past this.
    """
    shards: list[dict[str, tuple[str, Sequence[int]]]] = [{}]
    filled = total = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled, total = filled + nbytes, total + nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(file, make_header(shard), fetch)
        weight_map.update(dict.fromkeys(shard, file.name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    partial = directory / f".{INDEX}.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n")
    os.replace(partial, directory / INDEX)
