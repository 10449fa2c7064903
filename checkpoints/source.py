"""Where weights come from: a directory in the official format or a converted one, behind the same members."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.hub import local_path
from checkpoints.layout import Range, cut
from checkpoints.memory import aligned_empty
from checkpoints.names import MOST_SCALE, MOST_SCALE_CODE, STORED, Leaf, Piece, carried_leaf
from checkpoints.shards import DTYPES, INDEX, ShardReader
from dsv4_jax.config import ConfigError, ModelConfig, ScaleFormat, WeightFormat

MANIFEST, WEIGHTS, ORIGINALS = "manifest.json", "weights", "originals"
FORMAT = "dsv4-jax/2"
READERS = 8  # reads under way at a time
AHEAD_BYTES = 1 << 30  # of leaves read before their turn to be placed, at most
AHEAD_PART = 32  # and as a part of the whole
CACHE_BYTES = 32 << 20  # of tile tables
Index = tuple[int, ...]
Place = tuple[tuple[int, int], ...]


class Source(ABC):
    """A checkpoint on disk. `config` has its weight formats as actually stored."""

    path: Path
    fields: dict[str, Any]  # config.json as it is
    config: ModelConfig

    @abstractmethod
    def check(self, table: Mapping[str, Leaf]) -> None:
        """Raise CheckpointError unless every leaf is there, whole and of its dtype, and nothing unknown is."""

    @abstractmethod
    def carried(self) -> Mapping[str, tuple[str, list[int]]]:
        """Name -> (dtype, shape) of tensors that are kept but not used: the drafter of a DSpark release."""

    @abstractmethod
    def read(self, leaf: Leaf, index: tuple[slice, ...]) -> np.ndarray:
        """A region of a leaf in its stored form; of a converted checkpoint, only the tiles it touches are read."""

    def arrays(self, table: Mapping[str, Leaf], targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Every leaf as a device array of its target's dtype and sharding; what a device holds is read once."""
        arrays: dict[str, jax.Array] = {}
        ahead: deque[tuple[str, Future]] = deque()  # leaves being read while others are placed
        sizes = {path: math.prod(leaf.shape) * leaf.stored.itemsize for path, leaf in table.items()}
        limit, held = min(AHEAD_BYTES, sum(sizes.values()) // AHEAD_PART), 0
        with ThreadPoolExecutor(READERS) as pool:

            def place() -> int:
                path, reading = ahead.popleft()
                shards = reading.result()
                arrays[path] = put(shards, targets[path])
                return sum(shard.nbytes for shard in shards.values())

            try:
                for path, leaf in table.items():
                    ahead.append((path, pool.submit(self._shards, leaf, targets[path])))
                    held += sizes[path]
                    while len(ahead) > 1 and held > limit:
                        held -= place()
                while ahead:
                    place()
            finally:
                pool.shutdown(cancel_futures=True)
        return arrays

    def _shards(self, leaf: Leaf, target: jax.ShapeDtypeStruct) -> dict[Place, np.ndarray]:
        """What this process's devices hold of a leaf: each distinct region once."""
        indices = target.sharding.addressable_devices_indices_map(leaf.shape).values()
        distinct = {_place(index, leaf.shape): index for index in indices}
        return {place: self.read(leaf, index) for place, index in distinct.items()}


def open_source(path: str | Path) -> Source:
    """The checkpoint at `path`, official or converted; a hub id is downloaded first."""
    path = local_path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such directory; give a checkpoint directory (config.json beside its weights)"
        )
    if any(path.glob("*.safetensors")) or (path / INDEX).exists():
        return OfficialSource(path)
    if (path / MANIFEST).exists() or (path / WEIGHTS).exists():
        return ConvertedSource(path)
    raise CheckpointError(
        f"{path}: neither an official checkpoint (config.json with *.safetensors) nor one written by `dsv4 convert` "
        f"(with {MANIFEST})"
    )


def read_config(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json of a checkpoint directory, raw and understood."""
    file = path / "config.json"
    if not file.exists():
        raise CheckpointError(f"{file}: missing; copy the model's config.json beside its weights")
    try:
        config = ModelConfig.from_json(file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return json.loads(file.read_text()), config


class OfficialSource(Source):
    """config.json and *.safetensors under DeepSeek's names."""

    def __init__(self, path: Path):
        self.path = path
        self.fields, config = read_config(path)
        self.reader = ShardReader(path)
        self.config = self._with_stored_formats(config)

    def _with_stored_formats(self, config: ModelConfig) -> ModelConfig:
        """Formats follow the stored dtypes; a config that states other experts is refused (architecture 1.1)."""
        expert, scale = (
            self.reader.tensors.get(name) for name in ("layers.0.ffn.experts.0.w1.weight", "layers.0.attn.wq_a.scale")
        )
        if config.quantization is None or expert is None:
            return config
        forms: dict[str, WeightFormat] = {"I8": "fp4", "F8_E4M3": "fp8", "BF16": "bf16"}
        stored = forms.get(expert.dtype)
        stated = self.fields.get("expert_dtype") or self.fields.get("quantization_config", {}).get("expert_dtype")
        if stored is None or (stated and stated != stored):
            raise CheckpointError(
                f"{expert.file.name}: {expert.name} is stored as {expert.dtype}, but config.json says "
                f"expert_dtype={stated!r}; the config and the shards are not of one release"
            )
        scale_format: ScaleFormat = "f32" if scale is not None and scale.dtype == "F32" else "e8m0"
        formats = dataclasses.replace(config.quantization, expert_format=stored, scale_format=scale_format)
        return dataclasses.replace(config, quantization=formats)

    def carried(self) -> dict[str, tuple[str, list[int]]]:
        if self.config.draft != "dspark":
            return {}
        kept = (info for info in self.reader.tensors.values() if info.name.startswith("mtp."))
        return {info.name: (info.dtype, list(info.shape)) for info in kept}

    def check(self, table: Mapping[str, Leaf]) -> None:
        expected = {piece.name: leaf for leaf in table.values() for piece in leaf.pieces}
        missing = sorted(set(expected) - set(self.reader.tensors))
        if missing:
            raise CheckpointError(f"{self.path}: {_some('tensor', missing)} missing; download the shard(s) again")
        unknown = sorted(set(self.reader.tensors) - set(expected) - set(self.carried()))
        if unknown:
            raise CheckpointError(
                f"{self.reader.tensors[unknown[0]].file}: unknown {_some('tensor', unknown)}; "
                "config.json and the shards are not of one model"
            )
        for name, leaf in expected.items():
            info = self.reader.tensors[name]
            shape = leaf.piece_shape
            if info.dtype != leaf.official or tuple(info.shape) != shape:
                raise CheckpointError(
                    f"{info.file.name}: {name} is {info.dtype} {list(info.shape)}; "
                    f"config.json asks for {leaf.official} {list(shape)}"
                )

    def band(self, leaf: Leaf, outer: Index, rows: Range, columns: Range) -> np.ndarray:
        """Rows of one matrix of a leaf in their stored form, [rows, columns]; see `Layout.bands`. A view if it can be.

        Raises:
          CheckpointError: a block scale or an expert id is out of range.
        """
        stacked = len(leaf.pieces[0].index)
        name = leaf.names[outer[:stacked]]
        matrix = self._piece(leaf, name)[outer[stacked:]]
        band = matrix.reshape((1, 1, *matrix.shape)[-2:])[slice(*rows), slice(*columns)]
        if leaf.is_block_scale:
            check_scales(band, self._where(name))
        return self._narrowed(band, leaf, name)

    def read(self, leaf: Leaf, index: tuple[slice, ...]) -> np.ndarray:
        stacked = len(leaf.pieces[0].index)
        numbers = [range(*span.indices(size)) for span, size in zip(index[:stacked], leaf.shape, strict=False)]
        inner = [len(range(*span.indices(size))) for span, size in zip(index[stacked:], leaf.piece_shape, strict=True)]
        out = aligned_empty((*map(len, numbers), *inner), leaf.stored)
        for place in np.ndindex(*out.shape[:stacked]):
            name = leaf.names[tuple(span[n] for span, n in zip(numbers, place, strict=True))]
            out[place] = self._narrowed(self._piece(leaf, name)[index[stacked:]], leaf, name)
        return out

    def _piece(self, leaf: Leaf, name: str) -> np.ndarray:
        """A tensor's bytes as the leaf stores them, but for expert ids, which are still int64."""
        raw = self.reader.read(name)
        if leaf.official == "U8":
            return raw.reshape(-1).view(np.uint8).reshape(leaf.shape)
        return raw if leaf.official == "I64" else raw.view(leaf.stored)

    def _narrowed(self, array: np.ndarray, leaf: Leaf, name: str) -> np.ndarray:
        experts = self.config.n_routed_experts
        return _expert_ids(array, experts, self._where(name)) if leaf.official == "I64" else array

    def _where(self, name: str) -> str:
        return f"{self.reader.tensors[name].file.name}: {name}"


def _expert_ids(raw: np.ndarray, experts: int, where: str) -> np.ndarray:
    """Narrowed to int32, if they are experts of the config."""
    low, high = (int(raw.min()), int(raw.max())) if raw.size else (0, 0)
    if low < 0 or high >= experts:
        raise CheckpointError(f"{where} holds expert ids {low} .. {high}; config.json has {experts} experts")
    return raw.astype(STORED["I64"])


def check_scales(scales: np.ndarray, where: str) -> None:
    """Refuse block scales (E8M0 bytes or float32) that are not finite, negative, or too large for float32 weights."""
    if scales.dtype == np.uint8:
        bad = scales > MOST_SCALE_CODE
    else:
        bad = ~((scales >= 0) & (scales <= MOST_SCALE))
    if bad.any():
        place = tuple(int(n) for n in np.argwhere(bad)[0])
        value = scales[place]
        shown = f"byte {value}" if scales.dtype == np.uint8 else f"{value}"
        raise CheckpointError(
            f"{where} has a block scale out of range ({shown} at {list(place)}, {int(bad.sum())} in all); "
            "the file is damaged, download it again"
        )


class ConvertedSource(Source):
    """One directory written by `convert`: Orbax weights, config.json, and a manifest that says it is complete."""

    def __init__(self, path: Path):
        self.path = path
        self._context: Any = None
        self._stores: dict[str, Any] = {}
        if unfinished(path):
            raise CheckpointError(f"{path}: an unfinished conversion; run the same `dsv4 convert` again to finish it")
        try:
            self.manifest = dict(json.loads((path / MANIFEST).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path / MANIFEST}: cannot be read ({error}); the conversion did not finish, run `dsv4 convert` again"
            ) from None
        if self.manifest.get("format") != FORMAT or not self.manifest.get("complete"):
            raise CheckpointError(
                f"{path / MANIFEST}: format {self.manifest.get('format')!r}, complete={self.manifest.get('complete')}; "
                f"this version reads complete {FORMAT!r}; run `dsv4 convert` again"
            )
        _check_weight_files(path, self.manifest)
        self.fields, config = read_config(path)
        formats = self.manifest["quantization"]
        if config.quantization is not None:
            config = dataclasses.replace(config, quantization=dataclasses.replace(config.quantization, **formats))
        self.config = config

    def check(self, table: Mapping[str, Leaf]) -> None:
        written = self.manifest["leaves"]
        missing, unknown = sorted(set(table) - set(written)), sorted(set(written) - set(table))
        if missing or unknown:
            raise CheckpointError(
                f"{self.path}: does not fit its config.json (missing {missing[:3]}, unknown {unknown[:3]}); "
                "convert again"
            )
        for path, leaf in table.items():
            if written[path]["shape"] != list(leaf.shape) or written[path]["dtype"] != leaf.stored.name:
                raise CheckpointError(
                    f"{self.path}: {path} is {written[path]['dtype']} {written[path]['shape']}; "
                    f"config.json asks for {leaf.stored.name} {list(leaf.shape)}"
                )

    def carried(self) -> dict[str, tuple[str, list[int]]]:
        return {name: (dtype, shape) for name, (dtype, shape) in self.manifest["carried"].items()}

    def read(self, leaf: Leaf, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return self._store(leaf.path)[index].read().result()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path / WEIGHTS / leaf.path}: cannot be read ({error}); run `dsv4 convert` again"
            ) from error

    def form(self, path: str) -> tuple[np.dtype, tuple[int, ...]]:
        """dtype and shape of a stored array, by its own account."""
        try:
            store = self._store(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / WEIGHTS / path}: cannot be read ({error})") from error
        return store.dtype.numpy_dtype, tuple(store.shape)

    def _store(self, path: str):
        """The array of a leaf, opened once."""
        if path not in self._stores:
            import tensorstore as ts  # late, for it takes a while

            if self._context is None:
                limits = {"file_io_concurrency": {"limit": READERS}, "cache_pool": {"total_bytes_limit": CACHE_BYTES}}
                self._context = ts.Context(limits)
            store = {"driver": "file", "path": str((self.path / WEIGHTS / path).resolve())}
            spec = {"driver": "zarr3", "kvstore": store}
            self._stores[path] = ts.open(spec, open=True, read=True, context=self._context).result()
        return self._stores[path]


def stored_leaves(source: Source, table: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Every array of a converted checkpoint: the model's leaves, and tensors kept as bytes."""
    carried = [carried_leaf(name, DTYPES[dtype], shape) for name, (dtype, shape) in source.carried().items()]
    return {**table, **{leaf.path: leaf for leaf in carried}}


def regions(leaf: Leaf, piece: Piece, limit: int) -> Iterator[tuple[slice, ...]]:
    """A piece as regions of its leaf, whole rows of tiles of about `limit` bytes at most, in order."""
    stacked = tuple(slice(n, n + 1) for n in piece.index)
    shape = leaf.piece_shape
    if not shape:
        yield stacked
        return
    tile_rows = cut(leaf.shape, leaf.stored).tile[len(stacked)]
    row_bytes = math.prod(shape[1:]) * leaf.stored.itemsize
    step = max(limit // (row_bytes * tile_rows), 1) * tile_rows
    rest = tuple(slice(0, size) for size in shape[1:])
    for begin in range(0, shape[0], step):
        yield (*stacked, slice(begin, min(begin + step, shape[0])), *rest)


def unfinished(path: Path) -> bool:
    """Whether a directory bears the name of one that `convert` is still writing."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def weight_files(path: Path) -> dict[str, int]:
    """Relative name -> size of every file below a converted checkpoint's weights."""
    files = (file for file in (path / WEIGHTS).rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def _check_weight_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Fields and file sizes as convert left them; a store with a short file fails late, deep inside its readers."""
    absent = sorted({"quantization", "carried", "leaves", "files"} - set(manifest))
    if absent:
        raise CheckpointError(f"{path / MANIFEST}: has no {', '.join(absent)}; run `dsv4 convert` again")
    found = weight_files(path)
    for name, facts in manifest["files"].items():
        size = facts["bytes"]
        if name.startswith(f"{WEIGHTS}/") and found.get(name) != size:
            state = "missing" if name not in found else f"{found[name]} bytes, not the {size} it was written with"
            raise CheckpointError(f"{path / name}: {state}; copy the directory whole or run `dsv4 convert` again")


def put(shards: Mapping[Place, np.ndarray], target: jax.ShapeDtypeStruct) -> jax.Array:
    """Host arrays by region on the target's devices, in its dtype; the cast happens there."""
    places = target.sharding.addressable_devices_indices_map(target.shape)
    placed = [jax.device_put(shards[_place(index, target.shape)], device) for device, index in places.items()]
    placed = [shard if shard.dtype == target.dtype else shard.astype(target.dtype) for shard in placed]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, placed)


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> Place:
    """A region as (start, stop) per axis, by which two devices' regions compare."""
    return tuple(span.indices(size)[:2] for span, size in zip(index, shape, strict=True))


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"
