"""Routing on TPU: two programs where XLA makes forty.

Ids, ranks and counts are small whole numbers, which vectors of fp32 hold exactly and add up sooner than int32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import MIB, Chip, require
from pallas_kernels.routing.reference import ExpertRows, count_blocks

SUBLANES, LANES = 8, 128
ROWS = 128  # tokens of a tile, at most
MOST_COMPARED = 512  # pairs that are compared with each other


def _number(shape: tuple[int, int], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis).astype(jnp.float32)


def _route_kernel(scores_ref, bias_ref, index_ref, weights_ref, *, factor: float):
    scores = scores_ref[...]
    (rows, E), A = scores.shape, index_ref.shape[1]
    biased = scores + bias_ref[...]
    biased = jnp.where(biased != biased, jnp.inf, biased)  # what is not a number comes first, as in `top_k`
    ids, choice = _number((rows, E), 1), _number((rows, A), 1)
    index, weights, total = (jnp.zeros(choice.shape, jnp.float32) for _ in range(3))
    left = ids  # E: taken
    for a in range(A):
        best = jnp.max(jnp.where(left < E, biased, -jnp.inf), axis=1, keepdims=True)
        first = jnp.min(jnp.where(biased == best, left, E), axis=1, keepdims=True)
        taken = ids == first
        left = jnp.where(taken, E, left)
        score = jnp.sum(jnp.where(taken, scores, 0), axis=1, keepdims=True)
        index = jnp.where(choice == a, first, index)
        weights = jnp.where(choice == a, score, weights)
        total = total + score
    index_ref[...] = index.astype(jnp.int32)
    weights_ref[...] = weights / total * factor


def route_tpu(
    scores: jax.Array,
    bias: jax.Array,
    *,
    top_k: int,
    factor: float,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference.route` on the TPU `chip`.

    Raises:
      ValueError: scores and bias are not fp32 of as many experts, there are fewer than top_k, or `chip` is not a TPU.
    """
    require(chip, "route_tpu", platform="tpu")
    n, E = scores.shape
    if bias.shape != (E,) or {scores.dtype, bias.dtype} != {jnp.dtype(jnp.float32)} or not 0 < top_k <= E:
        raise ValueError(
            f"route_tpu: {scores.dtype} scores {scores.shape} and {bias.dtype} bias {bias.shape} must be float32 of as "
            f"many experts, {top_k} at least"
        )
    rows = min(ROWS, n)
    tile = lambda width: pl.BlockSpec((rows, width), lambda i: (i, 0))
    return pl.pallas_call(
        functools.partial(_route_kernel, factor=factor),
        grid=(pl.cdiv(n, rows),),
        in_specs=[tile(E), pl.BlockSpec((1, E), lambda i: (0, 0))],
        out_specs=[tile(top_k), tile(top_k)],
        out_shape=[jax.ShapeDtypeStruct((n, top_k), dtype) for dtype in (jnp.int32, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="route",
    )(scores, bias[None])


def _count(mask: jax.Array, axis: int, value: jax.Array | float = 1.0) -> jax.Array:
    """The sum of `value` where `mask` is."""
    return jnp.sum(jnp.where(mask, value, 0.0), axis=axis, keepdims=True)


def _sort_choices(index_ref, slots: list[jax.Array], place_ref) -> None:
    """slots: [n, 1] of each choice; into place go those of a token in the order of their experts."""
    A = len(slots)
    ids = [index_ref[:, a : a + 1] for a in range(A)]
    place = jnp.zeros(place_ref.shape, jnp.float32)
    lane = _number(place_ref.shape, 1)
    for a in range(A):
        earlier = [ids[b] <= ids[a] if b < a else ids[b] < ids[a] for b in range(A) if b != a]
        rank = sum((jnp.where(e, 1.0, 0.0) for e in earlier), jnp.zeros_like(slots[a]))
        place = jnp.where(lane == rank, slots[a], place)
    place_ref[...] = place.astype(jnp.int32)


def _arrange_kernel(
    index_ref, weights_ref, expert_ref, used_ref, token_ref, weight_ref, place_ref, *, experts: int, rows: int, n: int
):
    """Pairs lie by choices here, all tokens' first choices first; [P, 1] is a column, [1, P] a row."""
    tokens, A = index_ref.shape
    P, S, blocks = tokens * A, token_ref.shape[1], expert_ref.shape[1]
    column = lambda parts: jnp.concatenate(list(parts), axis=0)
    each = lambda ref: column(ref[:, a : a + 1] for a in range(A))
    diagonal = _number((P, P), 0) == _number((P, P), 1)
    turned = lambda x: _count(diagonal, 0, x)
    index = each(index_ref).astype(jnp.float32)
    token = column([_number((tokens, 1), 0)] * A)
    order = column(_number((tokens, 1), 0) * A + a for a in range(A))
    earlier = (index == turned(index)) & (turned(order) < order)
    expert = _number((1, experts), 1)
    blocks_of = jnp.ceil(_count(index == expert, 0) * (1 / rows))
    slot = _count(expert < index, 1, blocks_of) * rows + _count(earlier, 1)
    slot = jnp.where(index < experts, slot, -1.0)
    _sort_choices(index_ref, [slot[a * tokens : (a + 1) * tokens] for a in range(A)], place_ref)
    last_block = _count(expert <= _number((experts, 1), 0), 1, blocks_of)
    passed = _count(last_block <= _number((1, blocks), 1), 0)
    expert_ref[...] = jnp.minimum(passed, experts - 1).astype(jnp.int32)
    used_ref[...] = jnp.sum(blocks_of, axis=1, keepdims=True).astype(jnp.int32)
    slot_row, weight_row = turned(slot), turned(each(weights_ref))
    for start in range(0, S, LANES):
        cut = min(LANES, S - start)
        here = slot == _number((1, cut), 1) + start
        found = jnp.min(jnp.where(here, token, n), axis=0, keepdims=True)
        token_ref[:, start : start + cut] = found.astype(jnp.int32)
        here = slot_row == _number((cut, 1), 0) + start
        weight_ref[start : start + cut, :] = _count(here, 1, weight_row)


def arrange_pairs_tpu(
    index: jax.Array,
    weights: jax.Array,
    *,
    experts: int,
    rows: int,
    multiple: int = 1,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> ExpertRows:
    """`reference.arrange_pairs` of at most 512 pairs on the TPU `chip`.

    Raises:
      ValueError: there are more pairs, rows are no power of two, or `chip` is not a TPU.
    """
    require(chip, "arrange_pairs_tpu", platform="tpu")
    n, A = index.shape
    if not 0 < n * A <= MOST_COMPARED or rows & (rows - 1) or weights.shape != index.shape:
        raise ValueError(
            f"arrange_pairs_tpu: {index.shape} ids and {weights.shape} weights in blocks of {rows} rows; give at most "
            f"{MOST_COMPARED} and a power of two, or use the jnp op"
        )
    blocks, short = count_blocks(n * A, experts, rows, multiple), -n % SUBLANES
    pad = lambda a, value: jnp.pad(a, ((0, short), (0, 0)), constant_values=value) if short else a
    shape = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
    expert, used, token, weight, place = pl.pallas_call(
        functools.partial(_arrange_kernel, experts=experts, rows=rows, n=n),
        out_shape=[
            shape(1, blocks),
            shape(1, 1),
            shape(1, blocks * rows),
            shape(blocks * rows, 1, dtype=jnp.float32),
            shape(n + short, A),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=32 * MIB),
        interpret=interpret,
        name="arrange_pairs",
    )(pad(index.astype(jnp.int32), experts), pad(weights.astype(jnp.float32), 0))
    return ExpertRows(expert.reshape(-1), used.reshape(()), token.reshape(-1), weight, place[:n])
