"""TPU kernel: the few tiles that get a row are read, changed and written back.

XLA's scatter into 8-bit rows wants another tiling than everything that reads them, so it would copy the whole array to
that tiling and back for a single row.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip, require

TILE = 32  # rows of a tile of 8-bit values
WHOLE = 64  # rows up to which an array is one block
MOST = 16  # rows that are put at a time


def _kernel(index_ref, block_ref, *refs, arrays: int, size: int, held: int):
    fresh, old, new = (refs[i * arrays : (i + 1) * arrays] for i in range(3))
    b, k = pl.program_id(0), pl.program_id(1)
    index, block = index_ref[b, k], block_ref[b, k]
    is_first = (k == 0) | (block != block_ref[b, jnp.maximum(k - 1, 0)])

    @pl.when(is_first)
    def _():
        for source, target in zip(old, new, strict=True):
            target[...] = source[...]

    @pl.when(index < held)
    def _():
        for row, target in zip(fresh, new, strict=True):
            wide = target[0].astype(jnp.float32)  # exact for every dtype that is held
            here = lax.broadcasted_iota(jnp.int32, wide.shape, 0) == index - block * size
            new_row = row[0].astype(jnp.float32) if row.shape[1] == 1 else row[0, pl.ds(k, 1)]
            target[0] = jnp.where(here, new_row, wide).astype(target.dtype)


def put_rows_tpu(
    held: Any, rows: Any, index: jax.Array, *, chip: Chip, interpret: bool | pltpu.InterpretParams = False
) -> Any:
    """`reference.put_rows` on the TPU `chip`, in place where `held` is not used again.

    Indices ascend, but for one step back to 0, as those of a ring do, and those that are dropped come last.

    Raises:
      ValueError: shapes or dtypes disagree, there are more than 16 rows, or `chip` is not a TPU.
    """
    require(chip, "put_rows_tpu", platform="tpu")
    old, structure = jax.tree.flatten(held)
    fresh = jax.tree.leaves(rows)
    (B, K), S = index.shape, old[0].shape[1]
    for a, x in zip(old, fresh, strict=True):
        if a.shape[:2] != (B, S) or x.shape != (B, K, a.shape[2]) or a.dtype != x.dtype or a.dtype.itemsize > 4:
            raise ValueError(f"put_rows_tpu: rows {x.dtype} {x.shape} do not fit {a.dtype} {a.shape}")
    if K > MOST:
        raise ValueError(f"put_rows_tpu: {K} rows at a time, at most {MOST}; use the jnp op")
    # One of several narrow rows cannot be taken from a tile at a place known only when it runs.
    fresh = fresh if K == 1 else [x.astype(jnp.float32) for x in fresh]
    size = S if S <= WHOLE else TILE
    index = index.astype(jnp.int32)
    row = lambda x: pl.BlockSpec((1, K, x.shape[2]), lambda b, k, *_: (b, 0, 0))
    tile = lambda x: pl.BlockSpec((1, size, x.shape[2]), lambda b, k, _, block: (b, block[b, k], 0))
    out = pl.pallas_call(
        functools.partial(_kernel, arrays=len(old), size=size, held=S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K),
            in_specs=[*map(row, fresh), *map(tile, old)],
            out_specs=list(map(tile, old)),
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old],
        input_output_aliases={2 + len(old) + i: i for i in range(len(old))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="put_rows",
    )(index, _blocks(index, S, size), *fresh, *old)
    return jax.tree.unflatten(structure, out)


def _blocks(index: jax.Array, held: int, size: int) -> jax.Array:
    """The block of each row; a dropped one stays at the block before it."""
    block, columns = jnp.where(index < held, index // size, -1), list[jax.Array]()
    for k in range(index.shape[1]):
        columns.append(block[:, k] if k == 0 else jnp.where(block[:, k] < 0, columns[-1], block[:, k]))
    return jnp.maximum(jnp.stack(columns, axis=1), 0)
