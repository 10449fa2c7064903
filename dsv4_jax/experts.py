"""Routed experts' products: pairs of token and expert sorted into blocks, one expert at a time (architecture 6)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dsv4_jax.linear import linear
from dsv4_jax.numerics import Numerics
from dsv4_jax.quantized import QuantizedArray, Stack, Turned, Weight, dequantize
from pallas_kernels.expert_matmul.reference import pick_rows
from pallas_kernels.expert_rows import expert_hidden
from pallas_kernels.routing import (
    MOST_COMPARED,
    Blocks,
    ExpertRows,
    arrange_pairs,
    count_blocks,
)

FEW_TOKENS = 8  # up to which an expert that is read where it lies multiplies all of them
FEW_PAIRS = 16  # of token and choice, up to which each is a product of its own, written out
IN_PLACE = 4  # pairs up to which each product has a branch for every expert, of
BRANCHES = 16  # experts at most; compiling those takes its time
MOST_SORTED = 32768  # pairs up to which a kernel's are sorted, beyond they are counted in chunks of as many:
COUNTED = 128
SLAB_ROWS = 4096  # up to which a slab holds all blocks
MAX_BLOCK_ROWS = 128  # rows of one expert's product; larger blocks only add padding


class BlockKernels(Protocol):
    """What `expert_mlp_in_blocks` asks of a platform."""

    most_block_rows: int  # of one expert's product; a power of two

    def expert_product(
        self, x: jax.Array, row: jax.Array | None, expert: jax.Array, used: jax.Array, w: Weight
    ) -> jax.Array:
        """K blocks of R rows of x [n, in], all or those that `row` [K R] names, each times w [E, out, in] of its expert
        [K], or gate and up [E, 2, out / 2, in] -> [K R, out] in x.dtype; blocks past the `used` ones may hold anything,
        for no token reads them."""
        ...

    def arrange_pairs(self, index, weights, *, experts: int, rows: int, multiple: int) -> ExpertRows:
        """See `pallas_kernels.routing.reference.arrange_pairs`; at most MOST_COMPARED pairs."""
        ...

    def expert_hidden(
        self, both: jax.Array, weights: jax.Array | None, limit: float, numerics: Numerics, down: Weight
    ) -> jax.Array:
        """See `hidden`."""
        ...

    def add_rows(self, products: jax.Array, place: jax.Array) -> jax.Array:
        """See `pallas_kernels.expert_rows.reference.add_rows`; at most MOST_COMPARED places."""
        ...


def hidden(both: jax.Array, weights: jax.Array | None, limit: float, numerics: Numerics, down: Weight) -> jax.Array:
    """What an expert's down projection reads: gate and up [..., 2 F] joined in fp32, weighted by [..., 1], rounded once
    and by `numerics`."""
    return numerics.activations(expert_hidden(both, weights, limit=limit, rounded=False), down)


def mlp(
    x: jax.Array,
    gate_up: Weight,
    down: Weight,
    limit: float,
    numerics: Numerics,
    project: Callable[[jax.Array, Weight], jax.Array] = linear,
    join: Callable = hidden,
    weights: jax.Array | None = None,
) -> jax.Array:
    """One expert: x [..., M], rounded already, gate_up [2, F, M], down [M, F] -> [..., M] in x.dtype.

    project: multiplies with a weight, as `linear` does; join: `hidden`, as a platform does it.
    weights: [..., 1], the routing weight; goes in before the down projection and its rounding, as in the reference.
    """
    return project(join(project(x, joined(gate_up)), weights, limit, numerics, down), down)


def joined(gate_up: Weight) -> Weight:
    """gate_up [..., 2, F, M] -> [..., 2 F, M], one weight for both products; expanded where a block would span both."""
    *lead, _, rows, columns = gate_up.shape
    if isinstance(gate_up, QuantizedArray) and gate_up.scale is not None and rows % gate_up.block[0] == 0:
        merge = lambda x: x.reshape(*lead, -1, x.shape[-1])
        return dataclasses.replace(gate_up, data=merge(gate_up.data), scale=merge(gate_up.scale))
    wide: Any = dequantize(gate_up, jnp.float32) if isinstance(gate_up, QuantizedArray) else gate_up
    flat: Any = wide.as_matrix() if isinstance(wide, Turned) else wide.reshape(*lead, 2 * rows, columns)
    return flat


def as_one(w: Weight) -> Weight:
    """An expert product's weights, [E, out, in] or gate and up, as [E, out, in]."""
    return joined(w) if len(w.shape) == 4 else w


Sorted = tuple[jax.Array, jax.Array, Callable[[jax.Array, jax.Array], jax.Array]]


def by_sorting(index: jax.Array, experts: int) -> Sorted:
    """Expert ids [P] -> how many pairs each expert has [E]; each pair's rank among its expert's [P]; and a function
    (expert [K], rank [K, R]) -> pair, any for ranks there are not."""
    order = jnp.argsort(index, stable=True)
    counts = (index[:, None] == jnp.arange(experts)).sum(0)
    starts = jnp.cumsum(counts) - counts
    find = lambda expert, rank: order.at[starts[expert][:, None] + rank].get(mode="clip")
    return counts, jnp.argsort(order) - starts[index], find


def by_counting(index: jax.Array, experts: int) -> Sorted:
    """`by_sorting` for many pairs, of which a sort would take a TPU's compiler 20 seconds and 4 MiB of code a layer.

    Pairs are counted in chunks; a pair is found by its chunk, then by its place in there. Every pair is compared with
    every chunk, which a compiler that fuses does on the fly.
    """
    P = index.shape[0]
    chunks = jnp.pad(index, (0, -P % COUNTED), constant_values=experts).reshape(-1, 1, COUNTED)
    hot = chunks == jnp.arange(experts)[:, None]  # [chunks, E, COUNTED]
    up_to = jnp.triu(jnp.ones((COUNTED, COUNTED), jnp.bfloat16))
    within = jnp.matmul(hot.astype(jnp.bfloat16), up_to, preferred_element_type=jnp.float32).astype(jnp.int32)
    ends = jnp.cumsum(within[..., -1], axis=0)  # [chunks, E]: pairs of an expert up to the end of a chunk
    before = ends - within[..., -1]

    def find(expert: jax.Array, rank: jax.Array) -> jax.Array:
        passed = ends.T[expert][:, None] <= rank[..., None]  # [K, R, chunks]
        chunk = jnp.minimum(passed.sum(-1), len(ends) - 1)
        first = jnp.where(passed, ends.T[expert][:, None], 0).max(-1)
        return chunk * COUNTED + (within[chunk, expert[:, None]] <= (rank - first)[..., None]).sum(-1)

    ranks = jnp.where(hot, within + before[..., None] - 1, 0).sum(1)
    return ends[-1], ranks.reshape(-1)[:P], find


def make_blocks(index: jax.Array, experts: int, rows: int, multiple: int = 1, arrange=by_sorting) -> Blocks:
    """Expert ids [P] -> Blocks: min(P, P / rows + min(P, experts)) of them, which are always enough.

    Ids past the experts are in none. More blocks than `multiple` are filled up to a multiple of it.
    """
    P, block = index.shape[0], jnp.arange(count_blocks(index.shape[0], experts, rows, multiple))
    counts, rank_of_pair, find = arrange(index, experts)
    last_block = jnp.cumsum(-(-counts // rows))
    first_block = last_block + counts // -rows
    expert = jnp.minimum((last_block <= block[:, None]).sum(1), experts - 1)
    rank = (block - first_block[expert])[:, None] * rows + jnp.arange(rows)
    pair = jnp.where(rank < counts[expert][:, None], find(expert, rank), P)
    slot = first_block[index] * rows + rank_of_pair
    return Blocks(expert, pair, last_block[-1], slot)


def block_rows(pairs: int, experts: int) -> int:
    """Rows a block: the mean load of an expert, rounded up to a power of two; 1 where experts are hardly shared."""
    mean = pairs / experts
    return 1 if mean <= 1 else min(MAX_BLOCK_ROWS, 1 << math.ceil(math.log2(mean)))


def taken_apart(w: Weight) -> list[Weight] | None:
    """Each expert's weight, where each is an array of its own."""
    held: Any = w.data if isinstance(w, QuantizedArray) else w
    if not isinstance(held, Stack):
        return None
    return [dataclasses.replace(w, data=one) if isinstance(w, QuantizedArray) else one for one in held.each]


def each_expert(
    x, index, weights, gate_up: list[Weight], down: list[Weight], limit: float, numerics: Numerics
) -> jax.Array:
    """`expert_mlp` for few tokens and experts that lie apart: one that any token chose multiplies all of them.

    A product of a few rows takes no longer than reading the weight, which cut out of an array would be copied first.
    """
    n, A = index.shape
    hot = index[..., None] == jnp.arange(len(down))  # [n, A, E]
    weight = jnp.where(hot, weights[..., None], 0).sum(1)  # [n, E]
    nothing = lambda: jnp.zeros(x.shape, x.dtype)
    out = []
    for e, chosen in enumerate(hot.any((0, 1))):
        run = lambda e=e: mlp(x, gate_up[e], down[e], limit, numerics, weights=weight[:, e, None])
        out.append(jax.lax.cond(chosen, run, nothing))
    picked = jnp.stack(out)[index, jnp.arange(n)[:, None]].astype(jnp.float32)  # [n, A, M]
    again = (index[:, :, None] == index[:, None]) & jnp.tri(A, k=-1, dtype=bool)  # its weight is in the first one's
    return jnp.where(again.any(-1)[..., None], 0, picked).sum(1)


def of_expert(x: jax.Array, w: Weight, expert: jax.Array, product: Callable) -> jax.Array:
    """product(x, weight of one expert): read where it lies if it is an array of its own, else copied."""
    apart = taken_apart(w)
    if apart is None:
        return product(x, w[expert])
    return jax.lax.switch(expert, [functools.partial(product, w=one) for one in apart], x)


def few_pairs(x, index, weights, gate_up: Weight, down: Weight, limit: float, numerics: Numerics) -> jax.Array:
    """Experts index [P] of tokens x [n, M], weighted by [P] -> [P, M] in x.dtype: a product a pair, the rest together.

    A loop over pairs would cost more than the products, each a weight times one row.
    """
    pairs, choices = len(index), len(index) // len(x)
    both = lambda x, w: linear(x, joined(w))
    first = [of_expert(x[p // choices][None], gate_up, index[p], both) for p in range(pairs)]
    rows = hidden(jnp.concatenate(first), weights[:, None], limit, numerics, down)
    return jnp.concatenate([of_expert(rows[p][None], down, index[p], linear) for p in range(pairs)])


def expert_mlp(
    x, index, weights, gate_up: Weight, down: Weight, limit: float, numerics: Numerics, routed: int | None = None
) -> jax.Array:
    """The routed experts' sum: only the products that were routed, expert by expert.

    Args:
      x: [n, M] tokens, rounded already.
      index, weights: [n, A] expert ids and fp32 routing weights.
      gate_up, down: stacked [E, 2, F, M] and [E, M, F], quantised or not; one expert is expanded at a time.
      routed: experts there are in all, where these are some of them: other ids (>= E) then give nothing.
    Returns:
      fp32 [n, M]. A token's sum has a fixed order, so it does not depend on the other tokens.
    """
    (n, A), experts = index.shape, down.shape[0]
    P, rows = n * A, block_rows(n * A, routed or experts)
    flat = index.reshape(P)
    firsts, lasts = taken_apart(gate_up), taken_apart(down)
    few = n <= FEW_TOKENS or P <= FEW_PAIRS
    if firsts and lasts and few and not routed and (P > IN_PLACE or experts > BRANCHES):
        return each_expert(x, index, weights, firsts, lasts, limit, numerics)
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


def multiply_blocks(x, row: jax.Array | None, expert: jax.Array, used: jax.Array, w: Weight) -> jax.Array:
    """The grouped product that a kernel makes, plainly; see `BlockKernels`.

    Blocks past the `used` ones are zeros. One block's weight is expanded at a time, and again for a gradient.
    """
    rows, w = pick_rows(x, row), as_one(w)
    product = jax.checkpoint(lambda block, e: linear(block, dequantize(w[e], rows.dtype)))
    out = jax.lax.map(lambda args: product(*args), (rows.reshape(len(expert), -1, rows.shape[-1]), expert))
    return jnp.where((jnp.arange(len(expert)) < used)[:, None, None], out, 0).reshape(len(rows), -1)


def slab_blocks(tokens: int, choices: int, held: int, routed: int, rows: int) -> int:
    """Blocks worked on at a time: those that even routing fills, where each token has a choice among the `held`."""
    share = held / routed
    pairs = tokens * choices * share / (1 - (1 - share) ** choices)
    return max(math.ceil(pairs / rows) + held, SLAB_ROWS // rows)


def expert_mlp_in_blocks(
    x,
    index,
    weights,
    gate_up: Weight,
    down: Weight,
    limit: float,
    numerics: Numerics,
    kernels: BlockKernels,
    routed: int | None = None,
):
    """`expert_mlp` for a platform whose kernel takes many blocks at once: two grouped products instead of a loop.

    Where only some experts are held, most pairs may be others': blocks are then taken slab by slab, as many slabs as
    have rows, so that memory and time follow the pairs there are. Sums are in the order of experts either way.
    """
    (n, A), experts = index.shape, down.shape[0]
    P, rows = n * A, min(block_rows(n * A, routed or experts), kernels.most_block_rows)
    slab = slab_blocks(n, A, experts, routed or experts, rows)
    arrange = kernels.arrange_pairs
    if P > MOST_COMPARED:
        sort = by_sorting if P <= MOST_SORTED else by_counting
        arrange = functools.partial(arrange_pairs, make=functools.partial(make_blocks, arrange=sort))
    pairs = arrange(index, weights, experts=experts, rows=rows, multiple=slab)

    def run(expert: jax.Array, used: jax.Array, token: jax.Array, weight: jax.Array) -> jax.Array:
        both = kernels.expert_product(x, token, expert, used, gate_up)
        inner = kernels.expert_hidden(both, weight, limit, numerics, down)
        return kernels.expert_product(inner, None, expert, used, down)

    slab, slabs = min(slab, len(pairs.expert)), -(-len(pairs.expert) // slab)
    if slabs == 1:
        out = run(pairs.expert, pairs.used, pairs.token, pairs.weight)
        return kernels.add_rows(out, pairs.place) if P <= MOST_COMPARED else add_each(0, out, pairs.place)

    def add(total: jax.Array, first: jax.Array) -> jax.Array:
        take = lambda a, count: jax.lax.dynamic_slice_in_dim(a, first * count, slab * count)
        used = jnp.clip(pairs.used - first, 0, slab)
        out = run(take(pairs.expert, 1), used, take(pairs.token, rows), take(pairs.weight, rows))
        place = pairs.place - first * rows
        return add_each(total, out, jnp.where(place < len(out), place, -1))

    step = lambda total, first: (jax.lax.cond(first < pairs.used, add, lambda total, _: total, total, first), None)
    return jax.lax.scan(step, jnp.zeros(x.shape, jnp.float32), slab * jnp.arange(slabs))[0]


def add_each(total: jax.Array | int, products: jax.Array, place: jax.Array) -> jax.Array:
    """`add_rows` of many, which are fetched a choice at a time, to what there is."""
    for a in range(place.shape[1]):
        terms = products.at[place[:, a]].get(mode="clip").astype(jnp.float32)
        total += jnp.where(place[:, a, None] >= 0, terms, 0)
    return jnp.asarray(total)
