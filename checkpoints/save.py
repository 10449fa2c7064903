"""save: arrays in memory to the official files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints.directories import new_directory
from checkpoints.errors import CheckpointError
from checkpoints.names import abstract_model, leaf_table
from checkpoints.shards import DTYPES, write_checkpoint
from dsv4_jax.config import ModelConfig


def save(
    arrays: Mapping[str, jax.Array | np.ndarray], config: Mapping[str, Any], out: str | Path, *, force: bool = False
) -> Path:
    """Write a checkpoint in the official format.

    Args:
      arrays: leaf path ("layers.0.self_attn.q_a_proj.data") -> array, one per parameter and buffer of the model of
        `config`, quantised weights as their codes (".data") and scales (".scale"); the others are cast to what the
        format stores.
      config: a `config.json` dict.
    Raises:
      ConfigError: the config does not parse.
      CheckpointError: an array is missing, unknown or of the wrong shape, or `out` exists (and `force` is not given).
    """
    table = leaf_table(abstract_model(ModelConfig.from_dict(config)))
    unknown = sorted(set(arrays) - set(table))
    if unknown:
        raise CheckpointError(f"{unknown[0]}: the config's model has no such parameter; leave it out")
    for path, leaf in table.items():
        shape = tuple(arrays[path].shape) if path in arrays else None
        if shape != leaf.shape:
            raise CheckpointError(f"{path}: has shape {shape}, the config needs {leaf.shape}")
    places = {piece.name: (leaf, piece.index) for leaf in table.values() for piece in leaf.pieces}
    tensors = {name: (leaf.official, leaf.piece_shape) for name, (leaf, _) in places.items()}

    def fetch(name: str) -> np.ndarray:
        leaf, index = places[name]
        array, stored = np.asarray(arrays[leaf.path])[index], DTYPES[leaf.official]
        is_code = array.dtype.itemsize == stored.itemsize == 1  # the same bits under another name
        return array.view(stored) if is_code else array.astype(stored)

    with new_directory(Path(out), force) as work:
        write_checkpoint(work, tensors, fetch, shard_bytes=4 << 30)
        (work / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    return Path(out)
