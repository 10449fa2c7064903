"""TPU kernels: the few tiles that get a row are read, changed and written back.

XLA's scatter into 8-bit rows wants another tiling than everything that reads them, so it would copy the whole array to
that tiling and back for a single row. Short arrays go through Pallas's pipeline, and XLA may bring them to vector
memory and back meanwhile. Long ones must not travel, so they are pinned to HBM and their tiles copied by hand.
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
LONG = 1024  # rows from which an array stays in HBM
ABREAST = 16  # sequences whose tiles are copied side by side


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


def _long_kernel(index_ref, *refs, arrays: int, held: int):
    """All tiles of one row number are under way together; rows of one sequence come in turn, as they may share one."""
    *operands, sems = refs
    fresh, _, new, tiles = (operands[i * arrays : (i + 1) * arrays] for i in range(4))
    sequences, first = tiles[0].shape[0], pl.program_id(0) * tiles[0].shape[0]

    def copies(g: int, start, out: bool):
        for i, (target, tile) in enumerate(zip(new, tiles, strict=True)):
            far, near = target.at[first + g, pl.ds(start, TILE)], tile.at[g]
            yield pltpu.make_async_copy(*((near, far) if out else (far, near)), sems.at[g, i])

    for k in range(index_ref.shape[1]):
        index = [index_ref[first + g, k] for g in range(sequences)]
        # A row that is dropped changes nothing in the last tile.
        start = [pl.multiple_of(jnp.minimum(i, held - 1) // TILE * TILE, TILE) for i in index]
        for g in range(sequences):
            for copy in copies(g, start[g], out=False):
                copy.start()
        for g in range(sequences):
            for copy in copies(g, start[g], out=False):
                copy.wait()
            for row, tile in zip(fresh, tiles, strict=True):
                wide = tile[g].astype(jnp.float32)
                here = lax.broadcasted_iota(jnp.int32, wide.shape, 0) == index[g] - start[g]
                tile[g] = jnp.where(here, row[g, pl.ds(k, 1)].astype(jnp.float32), wide).astype(tile.dtype)
            for copy in copies(g, start[g], out=True):
                copy.start()
        for g in range(sequences):
            for copy in copies(g, start[g], out=True):
                copy.wait()


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
    put = _put_long if S >= LONG and S % TILE == 0 else _put
    return jax.tree.unflatten(structure, put(old, fresh, index.astype(jnp.int32), interpret))


def _put(old: list[jax.Array], fresh: list[jax.Array], index: jax.Array, interpret) -> list[jax.Array]:
    """Arrays whose tiles Pallas's pipeline brings."""
    (B, K), S = index.shape, old[0].shape[1]
    size = S if S <= WHOLE else TILE
    row = lambda x: pl.BlockSpec((1, K, x.shape[2]), lambda b, k, *_: (b, 0, 0))
    tile = lambda x: pl.BlockSpec((1, size, x.shape[2]), lambda b, k, _, block: (b, block[b, k], 0))
    return pl.pallas_call(
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


def _put_long(old: list[jax.Array], fresh: list[jax.Array], index: jax.Array, interpret) -> list[jax.Array]:
    """Arrays that stay in HBM."""
    B, K = index.shape
    abreast = max(g for g in range(1, ABREAST + 1) if B % g == 0)
    row = lambda x: pl.BlockSpec((abreast, K, x.shape[2]), lambda i, _: (i, 0, 0))
    pinned = [pl.BlockSpec(memory_space=pltpu.HBM)] * len(old)
    return pl.pallas_call(
        functools.partial(_long_kernel, arrays=len(old), held=old[0].shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B // abreast,),
            in_specs=[*map(row, fresh), *pinned],
            out_specs=pinned,
            scratch_shapes=[
                *(pltpu.VMEM((abreast, TILE, x.shape[2]), x.dtype) for x in old),
                pltpu.SemaphoreType.DMA((abreast, len(old))),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old],
        input_output_aliases={1 + len(old) + i: i for i in range(len(old))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="put_rows_long",
    )(index, *fresh, *old)


def _blocks(index: jax.Array, held: int, size: int) -> jax.Array:
    """The block of each row; a dropped one stays at the block before it."""
    block, columns = jnp.where(index < held, index // size, -1), list[jax.Array]()
    for k in range(index.shape[1]):
        columns.append(block[:, k] if k == 0 else jnp.where(block[:, k] < 0, columns[-1], block[:, k]))
    return jnp.maximum(jnp.stack(columns, axis=1), 0)
