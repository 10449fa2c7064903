"""inspect: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from checkpoints.names import Leaf, abstract_model, leaf_table
from checkpoints.shards import DTYPES
from checkpoints.source import OfficialSource, open_source, weight_files
from dsv4_jax.cache import CacheFormat, cache_bytes
from dsv4_jax.config import ModelConfig

PARTS = {  # a path fragment -> the part of the model it belongs to; the first that matches counts
    "mtp.": "MTP",
    ".experts.": "routed experts",
    ".shared_experts.": "shared expert",
    ".gate.": "router",
    ".indexer.": "indexer",
    ".compressor.": "compressor",
    ".self_attn.": "attention",
    "_hc.": "hyper-connections",
    "hc_head.": "hyper-connections",
    "embed_tokens": "embedding",
    "lm_head": "LM head",
}

CACHES = {
    "fp8, index keys fp4": CacheFormat("fp8", "fp4"),
    "fp8, index keys fp8": CacheFormat("fp8", "fp8"),
    "bfloat16": CacheFormat(jnp.bfloat16),
}


@dataclass(frozen=True)
class Inspection:
    """Counts by official dtype and by part of the model; bytes are those of the tensors, not of the files.

    cache: by format, the bytes of one sequence: a fixed part, and so many per token.
    """

    path: str
    format: str
    model: str
    parameters: int
    bytes: int
    tensors: int
    files: int
    draft: str
    by_dtype: dict[str, dict[str, int]]
    by_part: dict[str, dict[str, int]]
    cache: dict[str, dict[str, Any]]
    config: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inspect(path: str | Path) -> Inspection:
    """Describe a checkpoint, official or converted, after checking it against its config. Raises CheckpointError."""
    source = open_source(path)
    table = leaf_table(abstract_model(source.config))
    source.check(table)
    by_dtype: dict[str, dict[str, int]] = {}
    by_part: dict[str, dict[str, int]] = {}
    for leaf, nbytes, parameters in _sizes(table):
        _add(by_dtype, leaf.official, tensors=len(leaf.pieces), bytes=nbytes)
        _add(by_part, _part(leaf.path), parameters=parameters, bytes=nbytes)
    for name, (stored, shape) in source.carried().items():
        count = math.prod(shape)
        _add(by_dtype, stored, tensors=1, bytes=count * DTYPES[stored].itemsize)
        parameters = 0 if name.endswith(".scale") else count * (2 if stored == "I8" else 1)
        _add(by_part, "drafter", parameters=parameters, bytes=count * DTYPES[stored].itemsize)
    official = isinstance(source, OfficialSource)
    files = source.reader.files if isinstance(source, OfficialSource) else weight_files(source.path)
    return Inspection(
        path=str(path),
        format="official" if official else "converted",
        model=_describe(source.config),
        parameters=sum(part["parameters"] for part in by_part.values()),
        bytes=sum(part["bytes"] for part in by_part.values()),
        tensors=sum(counts["tensors"] for counts in by_dtype.values()),
        files=len(files),
        draft=source.config.draft,
        by_dtype=by_dtype,
        by_part=by_part,
        cache={name: _cache(source.config, form) for name, form in CACHES.items()},
        config=source.fields,
    )


def _cache(config: ModelConfig, form: CacheFormat) -> dict[str, Any]:
    sizes = cache_bytes(config, form)
    return {"fixed": sizes.fixed, "per_token": sizes.per_token, "per_token_of_one_layer": sizes.per_token_of}


def _add(counts: dict[str, dict[str, int]], key: str, **amounts: int) -> None:
    row = counts.setdefault(key, dict.fromkeys(amounts, 0))
    for name, amount in amounts.items():
        row[name] += amount


def _sizes(table: dict[str, Leaf]) -> Iterator[tuple[Leaf, int, int]]:
    """(leaf, official bytes, parameters); scales and lookup tables are no parameters, a packed byte is two."""
    for leaf in table.values():
        count = math.prod(leaf.shape)
        no_weight = leaf.path.endswith(".scale") and leaf.path.removesuffix("scale") + "data" in table
        parameters = 0 if no_weight or leaf.official == "I64" else count * (2 if leaf.official == "I8" else 1)
        yield leaf, count * DTYPES[leaf.official].itemsize, parameters


def _part(path: str) -> str:
    return next((part for fragment, part in PARTS.items() if fragment in path or path.startswith(fragment)), "norms")


def _describe(config: ModelConfig) -> str:
    kinds = [spec.kind.split("_")[0] for spec in config.layers]
    counts = ", ".join(
        f"{kinds.count(kind)} {label}"
        for kind, label in (("sliding", "sliding"), ("compressed", "CSA"), ("heavily", "HCA"))
    )
    weights = f"fp8 + {config.quantization.expert_format} experts" if config.quantization else "bf16"
    return f"DeepSeek-V4, {config.num_hidden_layers} layers ({counts}), hidden {config.hidden_size}, {weights}"
