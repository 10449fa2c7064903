"""Synthetic checkpoints in the official format: any config and size, random, and valid in every number format."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.directories import new_directory
from checkpoints.names import Leaf, abstract_model, leaf_table
from checkpoints.shards import write_checkpoint
from dsv4_jax.config import ALIASES, ModelConfig

Tensor = tuple[str, tuple[int, ...]]  # official dtype and shape
BLOCK_ELEMENTS = 1 << 22  # random numbers drawn at a time


def official_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Name -> (dtype, shape) of every tensor of a checkpoint of this config, in the order they are written."""
    return {
        piece.name: (leaf.official, leaf.piece_shape)
        for leaf in leaf_table(abstract_model(config)).values()
        for piece in leaf.pieces
    }


def synth(
    config: Mapping[str, Any],
    out: str | Path,
    *,
    seed: int = 0,
    force: bool = False,
    shard_bytes: int = 4 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a random checkpoint for a `config.json` dict; the same seed gives the same bytes.

    Weights have a variance of 1 / fan-in once dequantised, so that activations keep their size through the layers.

    Raises:
      ConfigError: the config does not parse. CheckpointError: `out` exists (and `force` is not given).
    """
    parsed = ModelConfig.from_dict(config)
    leaves = {p.name: leaf for leaf in leaf_table(abstract_model(parsed)).values() for p in leaf.pieces}
    tensors = {name: (leaf.official, leaf.piece_shape) for name, leaf in leaves.items()}
    done = 0

    def fetch(name: str) -> np.ndarray:
        nonlocal done
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        array = _tensor(name, leaves[name], parsed, rng)
        done += 1
        if progress:
            progress(done, len(tensors))
        return array

    with new_directory(Path(out), force) as work:
        write_checkpoint(work, tensors, fetch, shard_bytes=shard_bytes)
        (work / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    return Path(out)


def with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config cut to its first `layers` layers, its MTP layer kept."""
    parsed = ModelConfig.from_dict(config)
    if not 1 <= layers <= parsed.num_hidden_layers:
        raise ValueError(f"layers={layers} must be between 1 and the config's {parsed.num_hidden_layers}")
    cut = {
        "num_hidden_layers": layers,
        "num_hash_layers": min(layers, parsed.num_hash_layers),
        "compress_ratios": [*parsed.compress_ratios[:layers], *parsed.draft_ratios],
    }
    # Other spellings of these three would now contradict them.
    kept = {k: v for k, v in config.items() if ALIASES.get(k, k) not in (*cut, "layer_types", "mlp_layer_types")}
    return kept | cut


def _tensor(name: str, leaf: Leaf, config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    shape, dtype = leaf.piece_shape, leaf.official
    if dtype == "I64":
        draws = rng.random((shape[0], config.n_routed_experts), np.float32)
        return np.argpartition(draws, shape[1] - 1, axis=1)[:, : shape[1]].astype(np.int64)
    if dtype == "I8":
        return rng.integers(0, 256, shape, np.uint8).view(np.int8)
    if dtype == "F8_E4M3":
        return _blockwise(rng, shape, ml_dtypes.float8_e4m3fn, 16.0)
    if name.endswith(".scale"):
        return _scale(leaf, config, rng)
    if name.endswith("norm.weight"):
        return (1 + 0.1 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
    if dtype == "F32":
        spread = {"_fn": shape[-1] ** -0.5, "_base": 0.5, "scale": 0.5, "ape": 0.5, "sink": 1.0, "bias": 0.1}
        sigma = next(s for ending, s in spread.items() if name.endswith(ending))
        return sigma * rng.standard_normal(shape, np.float32)
    sigma = 1.0 if name == "embed.weight" else shape[-1] ** -0.5
    return _blockwise(rng, shape, ml_dtypes.bfloat16, sigma)


def _scale(leaf: Leaf, config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    """Block scales that bring codes of a known spread (fp8: 16, fp4 uniform: 2.9) to 1 / sqrt(fan-in), with jitter."""
    assert config.quantization is not None
    is_fp4 = leaf.path.startswith(("layers", "mtp")) and ".experts." in leaf.path
    is_fp4 = is_fp4 and config.quantization.expert_format == "fp4"
    block = 32 if is_fp4 else config.quantization.block[1]
    fan_in = leaf.piece_shape[-1] * block
    target = fan_in**-0.5 / (2.9 if is_fp4 else 16.0)
    if leaf.official == "F32":
        return (target * rng.uniform(0.7, 1.4, leaf.piece_shape)).astype(np.float32)
    exponent = 127 + round(float(np.log2(target)))
    return rng.integers(exponent - 1, exponent + 2, leaf.piece_shape, np.uint8).view(ml_dtypes.float8_e8m0fnu)


def _blockwise(rng: np.random.Generator, shape: tuple[int, ...], dtype, sigma: float) -> np.ndarray:
    """Normal numbers in a narrow dtype, drawn in bounded pieces."""
    out = np.empty(int(np.prod(shape)), dtype)
    for start in range(0, out.size, BLOCK_ELEMENTS):
        piece = out[start : start + BLOCK_ELEMENTS]
        piece[:] = (sigma * rng.standard_normal(piece.size, np.float32)).astype(dtype)
    return out.reshape(shape)
