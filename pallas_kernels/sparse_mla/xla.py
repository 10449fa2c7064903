"""Sparse MLA in portable XLA: blocks of queries, each against the band of window rows it can see.

A block reads `block + size - 1` window rows, so no score matrix over all pairs exists; entries come by gather
(`Indices`) or as one dense product under a mask (`FirstN`, `Mask`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_rows import Rows, dequantize_rows
from pallas_kernels.mask_bits import MaskBits
from pallas_kernels.sparse_mla.reference import FirstN, Indices, Mask, Picks, Window, as_mask, check_shapes

QUERY_BLOCK = 64
FEW_QUERIES = 16  # up to this many per row, the rows are the larger operand
GATHER_BYTES = 32 << 20  # bound on the rows gathered for one block of queries


def sparse_mla_xla(
    q, positions, window: Window, entries: Rows | None, picks: Picks | None, sinks, *, scale: float, return_lse=False
):
    """See `reference.sparse_mla`."""
    check_shapes(q, positions, window, entries, picks, sinks)
    out, lse = _in_blocks(q, positions, window, entries, picks, sinks, scale)
    return (out, lse) if return_lse else out


def _in_blocks(q, positions, window: Window, entries, picks, sinks, scale):
    T, block = q.shape[1], _query_block(q, picks)
    if T <= block:
        return _attend(q, positions, window, entries, picks, sinks, scale)
    if not isinstance(picks, Indices | None):  # read whole by every block: expand 8-bit rows once
        entries = dequantize_rows(entries, q.dtype)
    q, positions, picks = jax.tree.map(lambda x: split_queries(x, block), (q, positions, picks))

    def attend(blocks):
        q, positions, picks, first = blocks
        return _attend(q, positions, cut_band(window, first, block), entries, picks, sinks, scale)

    window = pad_band(window, -T % block)
    out = jax.lax.map(attend, (q, positions, picks, jnp.arange(q.shape[0]) * block))
    return jax.tree.map(lambda x: join_queries(x, T), out)


def _query_block(q, picks) -> int:
    if not isinstance(picks, Indices):
        return QUERY_BLOCK
    B, _, _, D = q.shape
    row_bytes = B * picks.index.shape[-1] * D * q.dtype.itemsize
    return max(1, min(QUERY_BLOCK, GATHER_BYTES // row_bytes))


def split_queries(x, block: int):
    """[B, T, ...] -> [blocks, B, block, ...], padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def join_queries(x, T: int):
    """[blocks, B, block, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def pad_band(window: Window, pad: int) -> Window:
    """A band lengthened by `pad` empty rows; other windows are left alone."""
    if not window.is_band or not pad:
        return window
    rows = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, pad), (0, 0))), window.rows)
    return Window(rows, jnp.pad(window.positions, ((0, 0), (0, pad)), constant_values=-1), window.size, is_band=True)


def cut_band(window: Window, first, block: int) -> Window:
    """The rows that queries first .. first + block - 1 can see."""
    if not window.is_band:
        return window
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, block + window.size - 1, axis=1)
    return Window(jax.tree.map(cut, window.rows), cut(window.positions), window.size, is_band=True)


def _attend(q, positions, window: Window, entries, picks, sinks, scale):
    pools = [_dense(q, window.rows, window.visible(positions), scale)]
    if isinstance(picks, FirstN):
        pools.append(_dense(q, entries, jnp.arange(entries.shape[1]) < picks.count[..., None], scale))
    elif isinstance(picks, Mask | MaskBits):
        pools.append(_dense(q, entries, as_mask(picks), scale))
    elif isinstance(picks, Indices):
        pools.append(_gathered(q, entries, picks.index, scale))
    return _softmax(q, pools, sinks)


def _product(spec: str, a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b.astype(a.dtype), precision=precision, preferred_element_type=jnp.float32)


def _dense(q, rows: Rows, seen, scale):
    """Scores of every row [B, S, D], masked, and how to weigh the same rows."""
    rows = dequantize_rows(rows, q.dtype)
    if q.shape[1] <= FEW_QUERIES:  # rows on the left are read as they lie
        logits = jnp.einsum("BSTH->BTHS", _product("BSD,BTHD->BSTH", rows, q))
    else:
        logits = _product("BTHD,BSD->BTHS", q, rows)
    logits = jnp.where(seen[:, :, None], logits * scale, -jnp.inf)
    return logits, lambda weights: _product("BTHS,BSD->BTHD", weights, rows)


def _gathered(q, entries, index, scale):
    gather = lambda leaf: jax.vmap(lambda row, i: row.at[i].get(mode="clip"))(leaf, index)  # [B, T, C, ...]
    rows = jnp.where((index >= 0)[..., None], dequantize_rows(jax.tree.map(gather, entries), q.dtype), 0)
    logits = _product("BTHD,BTCD->BTHC", q, rows) * scale
    logits = jnp.where((index >= 0)[:, :, None], logits, -jnp.inf)
    return logits, lambda weights: _product("BTHC,BTCD->BTHD", weights, rows)


def _softmax(q, pools, sinks):
    """One softmax over all pools and the sink, and its log-sum-exp; the division comes last, as in the reference."""
    peak = sinks
    for logits, _ in pools:
        peak = jnp.maximum(peak, logits.max(-1))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)[..., None]
    total, out = jnp.exp(sinks[:, None] - peak), 0.0
    for logits, weigh in pools:
        weights = jnp.exp(logits - peak)
        total = total + weights.sum(-1, keepdims=True)
        out = out + weigh(weights.astype(q.dtype))
    return (out / jnp.where(total == 0, 1.0, total)).astype(q.dtype), (jnp.log(total) + peak)[..., 0]
