"""Routed experts' products: pairs of token and expert sorted into blocks, one expert at a time (architecture 6)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.linear import linear
from dsv4_jax.numerics import Numerics
from dsv4_jax.quantized import QuantizedArray, Stack, Turned, Weight, dequantize

Product = Callable[[jax.Array, jax.Array, jax.Array, Weight], jax.Array]
FEW_PAIRS = 16  # of token and choice, up to which each is a product of its own, written out
IN_PLACE = 4  # pairs up to which each product has a branch for every expert; compiling those takes its time
MAX_BLOCK_ROWS = 128  # rows of one expert's product; larger blocks only add padding


def clamped_swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit); the gate has no lower clamp."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def mlp(
    x: jax.Array,
    gate_up: Weight,
    down: Weight,
    limit: float,
    numerics: Numerics,
    project: Callable[[jax.Array, Weight], jax.Array] = linear,
    weights: jax.Array | None = None,
) -> jax.Array:
    """One expert: x [..., M], rounded already, gate_up [2, F, M], down [M, F] -> [..., M] in x.dtype.

    project: multiplies with a weight, as `linear` does.
    weights: [..., 1], the routing weight; goes in before the down projection and its rounding, as in the reference.
    """
    gate, up = jnp.split(project(x, joined(gate_up)), 2, axis=-1)
    return project(hidden(gate, up, limit, numerics, down, weights), down)


def joined(gate_up: Weight) -> Weight:
    """gate_up [..., 2, F, M] -> [..., 2 F, M], one weight for both products; expanded where a block would span both."""
    *lead, _, rows, columns = gate_up.shape
    if isinstance(gate_up, QuantizedArray) and gate_up.scale is not None and rows % gate_up.block[0] == 0:
        merge = lambda x: x.reshape(*lead, -1, x.shape[-1])
        return dataclasses.replace(gate_up, data=merge(gate_up.data), scale=merge(gate_up.scale))
    wide: Any = dequantize(gate_up, jnp.float32) if isinstance(gate_up, QuantizedArray) else gate_up
    flat: Any = wide.as_matrix() if isinstance(wide, Turned) else wide.reshape(*lead, 2 * rows, columns)
    return flat


def hidden(gate, up, limit: float, numerics: Numerics, down: Weight, weights: jax.Array | None = None) -> jax.Array:
    """What an expert's down projection reads: gate and up joined in fp32, weighted, rounded once and by `numerics`."""
    wide = clamped_swiglu(gate.astype(jnp.float32), up.astype(jnp.float32), limit)
    return numerics.activations((wide if weights is None else wide * weights).astype(gate.dtype), down)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """Pairs (token, choice) sorted by expert and cut into blocks of R rows, none of which spans two experts.

    expert [K]: expert of each block; pair [K, R]: which pair sits in each row (P = none);
    used: how many blocks have rows; slot [P]: the row, counted over all blocks, where each pair went.
    """

    expert: jax.Array
    pair: jax.Array
    used: jax.Array
    slot: jax.Array


def make_blocks(index: jax.Array, experts: int, rows: int) -> Blocks:
    """Expert ids [P] -> Blocks; at most min(P, P / rows + min(P, experts)) of them exist. Ids past them are in none."""
    P = index.shape[0]
    order = jnp.argsort(index, stable=True)
    counts = (index[:, None] == jnp.arange(experts)).sum(0)
    starts = jnp.cumsum(counts) - counts
    last_block = jnp.cumsum(-(-counts // rows))
    first_block = last_block + counts // -rows
    block = jnp.arange(min(P, P // rows + min(P, experts)))
    expert = jnp.minimum((last_block <= block[:, None]).sum(1), experts - 1)
    rank = (block - first_block[expert])[:, None] * rows + jnp.arange(rows)
    pair = jnp.where(rank < counts[expert][:, None], order.at[starts[expert][:, None] + rank].get(mode="clip"), P)
    rank_of_pair = jnp.argsort(order) - starts[index]
    slot = first_block[index] * rows + rank_of_pair
    return Blocks(expert, pair, last_block[-1], slot)


def block_rows(pairs: int, experts: int) -> int:
    """Rows a block: the mean load of an expert, rounded up to a power of two; 1 where experts are hardly shared."""
    mean = pairs / experts
    return 1 if mean <= 1 else min(MAX_BLOCK_ROWS, 1 << math.ceil(math.log2(mean)))


def of_expert(x: jax.Array, w: Weight, expert: jax.Array, product: Callable, in_place: bool) -> jax.Array:
    """product(x, weight of one expert); `in_place`, one of a `Stack` is read where it lies, others are copied."""
    held: Any = w.data if isinstance(w, QuantizedArray) else w
    if not isinstance(held, Stack):
        return product(x, w[expert])
    marked = lambda one: dataclasses.replace(w, data=one) if isinstance(w, QuantizedArray) else one
    if not in_place:
        return product(x, marked(held.whole[expert]))
    return jax.lax.switch(expert, [lambda x, one=one: product(x, marked(one)) for one in held.each], x)


def few_pairs(x, index, weights, gate_up: Weight, down: Weight, limit: float, numerics: Numerics) -> jax.Array:
    """Experts index [P] of tokens x [n, M], weighted by [P] -> [P, M] in x.dtype: a product a pair, the rest together.

    A loop over pairs would cost more than the products, each a weight times one row.
    """
    pairs, choices = len(index), len(index) // len(x)
    read = functools.partial(of_expert, in_place=pairs <= IN_PLACE)
    both = lambda x, w: linear(x, joined(w))
    first = [read(x[p // choices][None], gate_up, index[p], both) for p in range(pairs)]
    gate, up = jnp.split(jnp.concatenate(first), 2, axis=-1)
    rows = hidden(gate, up, limit, numerics, down, weights[:, None])
    return jnp.concatenate([read(rows[p][None], down, index[p], linear) for p in range(pairs)])


def expert_mlp(
    x, index, weights, gate_up: Weight, down: Weight, limit: float, numerics: Numerics, routed: int | None = None
) -> jax.Array:
    """The routed experts' sum: only the products that were routed, expert by expert.

    Args:
      x: [n, M] tokens.
      index, weights: [n, A] expert ids and fp32 routing weights.
      gate_up, down: stacked [E, 2, F, M] and [E, M, F], quantised or not; one expert is expanded at a time.
      routed: experts there are in all, where these are some of them: other ids (>= E) then give nothing.
    Returns:
      fp32 [n, M]. A token's sum has a fixed order, so it does not depend on the other tokens.
    """
    (n, A), experts = index.shape, down.shape[0]
    P, rows = n * A, block_rows(n * A, routed or experts)
    x = numerics.activations(x, gate_up)
    flat = index.reshape(P)
    if P <= FEW_PAIRS and not routed:
        out = few_pairs(x, flat, weights.reshape(P), gate_up, down, limit, numerics)
        return add_up(out, index, experts, routed)
    if rows == 1 and not routed:
        blocks = Blocks(flat, jnp.arange(P)[:, None], jnp.int32(P), jnp.arange(P))
    else:
        blocks = make_blocks(flat, experts, rows)
    padded = jnp.concatenate([weights.reshape(P), jnp.zeros((1,), weights.dtype)])

    def run_block(_, block):
        expert, pair, is_used = block

        def run():
            token = jnp.minimum(pair, P - 1) // A
            return mlp(x[token], gate_up[expert], down[expert], limit, numerics, weights=padded[pair][:, None])

        nothing = lambda: jnp.zeros((rows, x.shape[1]), x.dtype)
        return None, jax.lax.cond(is_used, run, nothing) if rows > 1 or routed else run()

    used = jnp.arange(blocks.expert.shape[0]) < blocks.used
    _, out = jax.lax.scan(run_block, None, (blocks.expert, blocks.pair, used))
    return add_up(out.reshape(-1, x.shape[1])[blocks.slot], index, experts, routed)


def add_up(products: jax.Array, index: jax.Array, experts: int, routed: int | None) -> jax.Array:
    """Products [n * A, M] of the pairs in index [n, A] -> fp32 [n, M]; those of experts held elsewhere are nothing."""
    picked = products.reshape(*index.shape, -1).astype(jnp.float32)
    return (jnp.where((index < experts)[..., None], picked, 0) if routed else picked).sum(1)


def multiply_blocks(rows: jax.Array, expert: jax.Array, used: jax.Array, w: Weight) -> jax.Array:
    """The grouped product that a kernel makes, plainly: rows [K * R, in] of K blocks, each times its expert's weight.

    Blocks past the `used` ones are zeros. One block's weight is expanded at a time, and again for a gradient.
    """
    product = jax.checkpoint(lambda block, e: linear(block, dequantize(w[e], rows.dtype)))
    out = jax.lax.map(lambda args: product(*args), (rows.reshape(len(expert), -1, rows.shape[-1]), expert))
    return jnp.where((jnp.arange(len(expert)) < used)[:, None, None], out, 0).reshape(len(rows), -1)


def expert_mlp_in_blocks(
    x,
    index,
    weights,
    gate_up: Weight,
    down: Weight,
    limit: float,
    numerics: Numerics,
    product: Product,
    routed: int | None = None,
):
    """`expert_mlp` for a platform whose kernel takes all blocks at once: two grouped products instead of a loop.

    product: (rows [K * R, in], expert [K], blocks used, weight [E, out, in]) -> [K * R, out] in the rows' dtype; blocks
      past the used ones may hold anything finite.
    """
    (n, A), experts = index.shape, down.shape[0]
    P = n * A
    blocks = make_blocks(index.reshape(P), experts, block_rows(P, routed or experts))
    pair = blocks.pair.reshape(-1)
    rows = numerics.activations(x, gate_up)[jnp.minimum(pair, P - 1) // A]
    gate, up = jnp.split(product(rows, blocks.expert, blocks.used, joined(gate_up)), 2, axis=-1)
    share = jnp.where(pair < P, weights.reshape(P)[jnp.minimum(pair, P - 1)], 0)[:, None]
    out = product(hidden(gate, up, limit, numerics, down, share), blocks.expert, blocks.used, down)
    return add_up(out[blocks.slot], index, experts, routed)
