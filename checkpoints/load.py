"""checkpoints.load: a directory in, a model ready to run out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoints.errors import CheckpointError
from checkpoints.names import Leaf, leaf_table
from checkpoints.source import Source, open_source
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import DeepseekV4
from dsv4_jax.rope import RopeTable
from dsv4_jax.sharding import SINGLE, Parallel, leaf_path

DEFAULT_MAX_TOKENS = 8192
Partition = Callable[[str, tuple[int, ...]], PartitionSpec]


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    partition: Partition | None = None,
    max_tokens: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    kernels: str = "auto",
    numerics: str = "auto",
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> DeepseekV4:
    """Load a checkpoint.

    Args:
      path: a directory in the official format, or one that `convert` wrote.
      mesh: devices to run on, with axes called data, expert or model (see `dsv4_jax.sharding`, and `dsv4_jax.make_mesh`
        for one that fits); default the first device alone. Of a converted checkpoint a process reads no more than its
        devices hold, to within the size of a tile.
      partition: for callers who lay weights over any mesh their own way, and call the layers themselves: (leaf path,
        shape) -> PartitionSpec.
      max_tokens: longest sequence, prompt and continuation; default the smaller of the config's limit and 8,192.
      dtype: of activations and of weights stored unquantised; default bfloat16 on accelerators, float32 on CPU.
      kernels: platform strategy by name; "auto" chooses.
      numerics: "official" rounds activations where the released model does, "exact" nowhere; "auto" is "official"
        where the checkpoint is quantised. Weights stay quantised in both.
      cache_dtype: of KV rows and index keys: float32, bfloat16 or "fp8"; default `dtype`.
    Raises:
      CheckpointError: something is wrong with the files; the message names file and tensor.
      ValueError: an argument that does not fit.
    """
    if partition and mesh is None:
        raise ValueError("partition needs a mesh to lay the weights over; give mesh=")
    source = open_source(path)
    dtype = default_dtype(mesh) if dtype is None else _float(dtype, "dtype")
    cache_dtype = cache_dtype if cache_dtype in (None, "fp8") else _float(cache_dtype, "cache_dtype", "fp8")
    limit = _max_tokens(source.config, max_tokens)
    if source.config.draft == "dspark":
        warnings.warn(f"{path}: the DSpark drafter is not used; the model generates without drafts", stacklevel=2)
    parallel = Parallel.over(mesh, source.config) if mesh is not None and partition is None else SINGLE
    options: dict[str, Any] = {"dtype": dtype, "kernels": kernels, "numerics": numerics, "cache_dtype": cache_dtype}
    options["parallel"] = parallel
    model = jax.eval_shape(lambda: DeepseekV4(source.config, max_tokens=limit, **options))
    if partition is not None:
        return fill(model, source, mesh, partition)
    assert not isinstance(parallel.mesh, AbstractMesh)
    return fill(model, source, parallel.mesh, lambda path, shape: parallel.spec(path))


def fill(model: DeepseekV4, source: Source, mesh: Mesh | None, partition: Partition | None = None) -> DeepseekV4:
    """An abstract model with its parameters read from `source` and its RoPE tables computed, each once."""
    table = leaf_table(model)
    source.check(table)
    sharding = NamedSharding(mesh, PartitionSpec()) if mesh else SingleDeviceSharding(jax.local_devices()[0])
    keyed, structure = jax.tree_util.tree_flatten_with_path(model)
    abstract = {leaf_path(keys): leaf for keys, leaf in keyed}
    targets = {
        path: jax.ShapeDtypeStruct(
            abstract[path].shape,
            abstract[path].dtype,
            sharding=NamedSharding(mesh, partition(path, abstract[path].shape)) if mesh and partition else sharding,
        )
        for path in table
    }
    arrays = source.arrays(table, targets)
    check_scales(arrays, table, source)
    model = jax.tree.unflatten(structure, [arrays.get(path, leaf) for path, leaf in abstract.items()])
    for table_module in (model.rope_main, model.rope_compress):
        assert isinstance(table_module, RopeTable)
        table_module.fill(sharding)
    return model


def check_scales(arrays: Mapping[str, jax.Array], table: Mapping[str, Leaf], source: Source) -> None:
    """Raise CheckpointError where a scale is no number: byte 255 of e8m0, or a float32 not finite or below 0."""
    wrong = jax.jit(lambda x: (x == 255 if x.dtype == jnp.uint8 else ~((x >= 0) & jnp.isfinite(x))).any())
    scales = {path for path in table if path.endswith(".scale") and path.removesuffix("scale") + "data" in table}
    found = jax.device_get({path: wrong(arrays[path]) for path in scales})
    for path in (path for path, is_wrong in found.items() if is_wrong):
        scale = np.asarray(arrays[path])
        bad = scale == 255 if scale.dtype == np.uint8 else ~((scale >= 0) & np.isfinite(scale))
        name = next(piece.name for piece in table[path].pieces if bad[piece.index].any())
        raise CheckpointError(
            f"{source.path}: {name} holds a scale that is not a number ({scale[bad][0]}); download its shard again"
        )


def default_dtype(mesh: Mesh | None):
    """float32 on CPU, bfloat16 elsewhere."""
    platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
    return jnp.float32 if platform == "cpu" else jnp.bfloat16


def _float(dtype, name: str, *others: str):
    choices = " or ".join(("float32", "bfloat16", *others))
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"{name}={dtype!r} is not a dtype; choose {choices}") from None
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{name}={dtype} is not supported; choose {choices}")
    return dtype


def _max_tokens(config: ModelConfig, max_tokens: int | None) -> int:
    limit = config.max_position_embeddings
    if max_tokens is None:
        return min(limit, DEFAULT_MAX_TOKENS)
    if not isinstance(max_tokens, (int, np.integer)) or not 1 <= max_tokens <= limit:
        raise ValueError(
            f"max_tokens={max_tokens!r} must be an integer between 1 and the config's max_position_embeddings={limit}"
        )
    return int(max_tokens)
