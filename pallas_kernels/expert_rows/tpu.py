"""What lies between and behind the products of experts on TPU, one program each."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import MIB, Chip, require
from pallas_kernels.expert_rows.reference import clamped_swiglu
from pallas_kernels.round_rows.reference import GROUP
from pallas_kernels.round_rows.tpu import round_group

ROWS, CHANNELS = 128, 1024  # of a tile of `expert_hidden`, at most
SUM_BYTES = 8 * MIB  # of the rows that `add_rows` holds at a time, in fp32


def _hidden_kernel(*refs, limit: float, rounded: bool):
    gate_ref, up_ref, *weight_ref, out_ref = refs
    for start in range(0, out_ref.shape[1], GROUP):
        cut = slice(start, start + GROUP)
        out = clamped_swiglu(gate_ref[:, cut].astype(jnp.float32), up_ref[:, cut].astype(jnp.float32), limit)
        for ref in weight_ref:
            out = jnp.where(ref[...] != 0, out * ref[...], 0)
        out = out.astype(out_ref.dtype)
        out_ref[:, cut] = round_group(out.astype(jnp.float32)).astype(out_ref.dtype) if rounded else out


def expert_hidden_tpu(
    both: jax.Array,
    weight: jax.Array | None = None,
    *,
    limit: float,
    rounded: bool,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """`reference.expert_hidden` on the TPU `chip`.

    Raises:
      ValueError: F is no multiple of 128, or `chip` is not a TPU.
    """
    require(chip, "expert_hidden_tpu", platform="tpu")
    *lead, F = (*both.shape[:-1], both.shape[-1] // 2)
    if both.shape[-1] % (2 * GROUP):
        raise ValueError(f"expert_hidden_tpu: {F} channels are no multiple of {GROUP}; use the jnp op")
    if not both.size:
        return jnp.zeros((*lead, F), both.dtype)
    held = both.reshape(-1, 2 * F)
    rows = min(ROWS, len(held))
    width = max(n for n in range(GROUP, min(CHANNELS, F) + 1, GROUP) if F % n == 0)
    steps = F // width
    column = [] if weight is None else [weight.reshape(-1, 1)]
    out = pl.pallas_call(
        functools.partial(_hidden_kernel, limit=limit, rounded=rounded),
        grid=(steps, pl.cdiv(len(held), rows)),
        in_specs=[
            pl.BlockSpec((rows, width), lambda k, i: (i, k)),
            pl.BlockSpec((rows, width), lambda k, i: (i, k + steps)),
            *(pl.BlockSpec((rows, 1), lambda k, i: (i, 0)) for _ in column),
        ],
        out_specs=pl.BlockSpec((rows, width), lambda k, i: (i, k)),
        out_shape=jax.ShapeDtypeStruct((len(held), F), both.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="expert_hidden",
    )(held, held, *column)
    return out.reshape(*lead, F)


def _add_kernel(place_ref, products_ref, out_ref, wide_ref):
    tokens, choices = place_ref.shape
    wide_ref[...] = products_ref[...].astype(jnp.float32)  # of which a row may be taken anywhere

    def add(t, _):
        total = jnp.zeros((1, out_ref.shape[1]), jnp.float32)
        for a in range(choices):
            place = place_ref[t, a]
            total += jnp.where(place >= 0, wide_ref[pl.ds(jnp.maximum(place, 0), 1), :], 0)
        out_ref[pl.ds(t, 1), :] = total
        return _

    jax.lax.fori_loop(0, tokens, add, 0)


def add_rows_tpu(
    products: jax.Array, place: jax.Array, *, chip: Chip, interpret: bool | pltpu.InterpretParams = False
) -> jax.Array:
    """`reference.add_rows` on the TPU `chip`, for few tokens and rows.

    Raises:
      ValueError: M is no multiple of 128, 128 channels of all rows are more than 8 MiB, or `chip` is not a TPU.
    """
    require(chip, "add_rows_tpu", platform="tpu")
    S, M = products.shape
    if M % GROUP or 4 * S * GROUP > SUM_BYTES:
        raise ValueError(f"add_rows_tpu: {products.shape} products are too many or no multiple of 128; use the jnp op")
    most = max(GROUP, min(CHANNELS, SUM_BYTES // (4 * S)))
    width = max(n for n in range(GROUP, most + 1, GROUP) if M % n == 0)
    return pl.pallas_call(
        _add_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(M // width,),
            in_specs=[pl.BlockSpec((S, width), lambda k, _: (0, k))],
            out_specs=pl.BlockSpec((len(place), width), lambda k, _: (0, k)),
            scratch_shapes=[pltpu.VMEM((S, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((len(place), M), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=48 * MIB),
        interpret=interpret,
        name="add_rows",
    )(place.astype(jnp.int32), products)
