"""Where weights come from: a directory in the official format or a converted one, behind the same four members."""

from __future__ import annotations

import dataclasses
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.names import Leaf
from checkpoints.shards import INDEX, ShardReader
from dsv4_jax.config import ConfigError, ModelConfig, ScaleFormat, WeightFormat

MANIFEST, WEIGHTS, ORIGINALS = "manifest.json", "weights", "originals"
FORMAT = "dsv4-jax/1"


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
    def arrays(self, table: Mapping[str, Leaf], targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Every leaf as a device array of its target's dtype and sharding."""


def open_source(path: str | Path) -> Source:
    """The checkpoint at `path`, official or converted."""
    path = Path(path)
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

    def stored(self, leaf: Leaf) -> np.ndarray:
        """A leaf put together in its stored form (host memory)."""
        if len(leaf.pieces) == 1 and not leaf.pieces[0].index:
            return self._piece(leaf, leaf.pieces[0].name)
        out = np.empty(leaf.shape, leaf.stored)
        for piece in leaf.pieces:
            out[piece.index] = self._piece(leaf, piece.name)
        return out

    def _piece(self, leaf: Leaf, name: str) -> np.ndarray:
        raw = self.reader.read(name)
        if leaf.official != "I64":
            return raw.view(leaf.stored)
        low, high = int(raw.min()), int(raw.max())
        if low < 0 or high >= self.config.n_routed_experts:
            raise CheckpointError(
                f"{self.reader.tensors[name].file.name}: {name} holds expert ids {low} .. {high}; "
                f"config.json has {self.config.n_routed_experts} experts"
            )
        return raw.astype(leaf.stored)

    def arrays(self, table, targets):
        return {path: put(self.stored(leaf), targets[path]) for path, leaf in table.items()}


class ConvertedSource(Source):
    """One directory written by `convert`: Orbax weights, config.json, and a manifest that says it is complete."""

    def __init__(self, path: Path):
        self.path = path
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

    def arrays(self, table, targets):
        return self.restore({path: targets[path] for path in table})

    def restore(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        """Read the named leaves; only the bytes that the targets' shardings need are read."""
        checkpointer, args = orbax()
        try:
            # Orbax pairs what it restores with the whole stored tree, so leaves not asked for are left out by it.
            return checkpointer.restore(
                self.path.resolve() / WEIGHTS,
                args=args.PyTreeRestore(item=dict(targets), restore_args=restore_args(targets), partial_restore=True),
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path / WEIGHTS}: cannot be read ({error}); run `dsv4 convert` again"
            ) from error


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
    for name, size in manifest["files"].items():
        if found.get(name) != size:
            state = "missing" if name not in found else f"{found[name]} bytes, not the {size} it was written with"
            raise CheckpointError(f"{path / name}: {state}; copy the directory whole or run `dsv4 convert` again")


def orbax():
    """(checkpointer, args module); imported late, for it takes a second."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()), ocp.args


def restore_args(targets: Mapping[str, jax.ShapeDtypeStruct]):
    """Per leaf: the dtype to cast to and the sharding to read for (none = a numpy array)."""
    import orbax.checkpoint as ocp

    def one(target: jax.ShapeDtypeStruct):
        if target.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=target.dtype)
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=target.sharding, dtype=target.dtype)

    return {path: one(target) for path, target in targets.items()}


def put(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """A host array on the target's device(s), in its dtype; the cast happens there."""
    placed = jax.device_put(array, target.sharding)
    return placed if placed.dtype == target.dtype else placed.astype(target.dtype)


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"
