"""The indexer's selection in portable XLA: blocks of queries, and nothing at all while everything is picked anyway."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.index_topk.reference import index_scores
from pallas_kernels.sparse_mla.reference import Indices, Mask, Picks
from pallas_kernels.sparse_mla.xla import split_queries

SCORE_BYTES = 32 << 20  # bound on one block's per-head scores
FEW_QUERIES = 16  # up to this many per row, the keys are much the larger operand
DENSE_LIMIT = 4  # up to this many entries per pick, a mask over all entries beats gathering rows


def pick_entries_xla(q, weights, keys, visible, *, top_k: int) -> Picks:
    """See `reference.pick_entries`; a `Mask` where attention over all entries is cheaper than a gather."""
    (B, T, H, _), N = q.shape, keys.shape[1]
    top_k = min(top_k, N)
    dense = T > 1 and N <= DENSE_LIMIT * top_k
    pick, everything = (_pick_mask, _all_mask) if dense else (_pick_indices, _all_indices)
    block = max(1, min(T, SCORE_BYTES // (4 * B * H * N)))

    def scored():
        if T <= block:
            return pick(q, weights, keys, visible, top_k)
        blocks = jax.tree.map(lambda x: split_queries(x, block), (q, weights, visible))
        out = jax.lax.map(lambda args: pick(args[0], args[1], keys, args[2], top_k), blocks)
        return jnp.moveaxis(out, 0, 1).reshape(B, -1, out.shape[-1])[:, :T]

    picked = jax.lax.cond(visible.max() <= top_k, lambda: everything(visible, N, top_k), scored)
    return Mask(picked) if dense else Indices(picked)


def _scores(q, weights, keys, visible):
    scores = (_scores_of_few if q.shape[1] <= FEW_QUERIES else index_scores)(q, weights, keys)
    return jnp.where(jnp.arange(keys.shape[1]) >= visible[..., None], -jnp.inf, scores)


def _scores_of_few(q, weights, keys):
    """`index_scores` with the keys as the left operand, which is read as it lies; as the right one it is transposed."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dots = jnp.einsum(
        "BND,BTHD->BNTH", keys.astype(q.dtype), q, precision=precision, preferred_element_type=jnp.float32
    )
    return jnp.einsum("BNTH,BTH->BTN", jax.nn.relu(dots), weights.astype(jnp.float32), precision="highest")


def _pick_indices(q, weights, keys, visible, top_k: int):
    best, index = jax.lax.top_k(_scores(q, weights, keys, visible), top_k)
    return jnp.where(best == -jnp.inf, -1, index)


def _pick_mask(q, weights, keys, visible, top_k: int):
    if q.shape[1] <= FEW_QUERIES:  # so few rows are sorted sooner than the passes below are started
        index = _pick_indices(q, weights, keys, visible, top_k)
        return (index[..., None] == jnp.arange(keys.shape[1])).any(-2)
    scores = _scores(q, weights, keys, visible)
    last = kth_largest(scores, top_k)[..., None]
    above, tied = scores > last, (scores == last) & (scores > -jnp.inf)
    left = top_k - above.sum(-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= left))


def _all_indices(visible, N: int, top_k: int):
    index = jnp.arange(min(top_k, N), dtype=jnp.int32)
    return jnp.where(index < visible[..., None], index, -1)


def _all_mask(visible, N: int, top_k: int):
    return jnp.arange(N) < visible[..., None]


def kth_largest(x: jax.Array, k: int) -> jax.Array:
    """The k-th largest of the last axis, exactly: 32 counting passes over order-preserving integer keys.

    A sort of every row costs over twenty times as much on CPU.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    top = jnp.uint32(1 << 31)
    keys = jnp.where(bits >= top, ~bits, bits | top)

    def next_bit(i, found):
        candidate = found | (top >> i.astype(jnp.uint32))
        enough = (keys >= candidate[..., None]).sum(-1) >= k
        return jnp.where(enough, candidate, found)

    found = jax.lax.fori_loop(0, 32, next_bit, jnp.zeros(x.shape[:-1], jnp.uint32))
    return jax.lax.bitcast_convert_type(jnp.where(found >= top, found ^ top, ~found), jnp.float32)
