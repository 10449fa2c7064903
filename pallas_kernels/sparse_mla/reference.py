"""The contract of sparse MLA: what is attended to, and the arithmetic, in the plainest jnp."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.kv_rows import Rows, dequantize_rows
from pallas_kernels.mask_bits import MaskBits, unpack_mask


@functools.partial(jax.tree_util.register_dataclass, data_fields=("rows", "positions"), meta_fields=("size", "is_band"))
@dataclass(frozen=True)
class Window:
    """Recent KV rows in any order; the query at position p attends to those with p - size < position <= p.

    rows: [B, S, D] or `Fp8Rows`, each both key and value.
    positions: int32 [B, S], the absolute position of each row; negative = empty.
    is_band: rows are in order, without gaps, and row t + size - 1 is that of query t (so query t needs only rows
      t .. t + size - 1); a promise that a blocked implementation may use.
    """

    rows: Rows
    positions: jax.Array
    size: int
    is_band: bool = False

    def visible(self, positions: jax.Array) -> jax.Array:
        """int32 [B, T] query positions -> bool [B, T, S]."""
        row, query = self.positions[:, None, :], positions[:, :, None]
        return (row >= 0) & (row <= query) & (row > query - self.size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FirstN:
    """Each query picks the first `count` entries; count int32 [B, T]."""

    count: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Indices:
    """Each query picks the listed entries; index int32 [B, T, C], -1 picks nothing."""

    index: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Each query picks the entries that are True in mask bool [B, T, N]."""

    mask: jax.Array


Picks = FirstN | Indices | Mask | MaskBits


def as_mask(picks: Mask | MaskBits) -> jax.Array:
    """bool [B, T, N]."""
    return unpack_mask(picks) if isinstance(picks, MaskBits) else picks.mask


def check_shapes(q, positions, window: Window, entries, picks: Picks | None, sinks) -> None:
    """Raise ValueError where the operands of `sparse_mla` do not fit each other."""
    B, T, H, D = q.shape
    if positions.shape != (B, T) or sinks.shape != (H,) or window.rows.shape[::2] != (B, D):
        raise ValueError(
            f"sparse_mla: q {q.shape} does not fit positions {positions.shape}, sinks {sinks.shape} "
            f"and window rows {window.rows.shape}"
        )
    if (entries is None) != (picks is None) or (entries is not None and entries.shape[::2] != (B, D)):
        raise ValueError(f"sparse_mla: q {q.shape} does not fit entries {getattr(entries, 'shape', None)} and {picks}")
    if isinstance(picks, MaskBits) and picks.size != entries.shape[1]:
        raise ValueError(f"sparse_mla: a mask of {picks.size} bits does not fit entries {entries.shape}")


def picked_entries(entries: Rows, picks: Picks) -> tuple[jax.Array, jax.Array]:
    """The rows on offer, fp32 [B, 1 or T, C, D], and which of them each query picks, bool [B, T, C]."""
    wide = dequantize_rows(entries, jnp.float32)
    if isinstance(picks, Indices):
        rows = jax.vmap(lambda row, index: row[index])(wide, jnp.maximum(picks.index, 0))
        return rows, picks.index >= 0
    if isinstance(picks, FirstN):
        return wide[:, None], jnp.arange(entries.shape[1]) < picks.count[..., None]
    return wide[:, None], as_mask(picks)


def sparse_mla(
    q, positions, window: Window, entries: Rows | None, picks: Picks | None, sinks, *, scale: float, return_lse=False
):
    """One softmax per query and head over window rows, picked entries and a sink.

    Args:
      q: [B, T, H, D], RoPE already applied to the trailing channels.
      positions: int32 [B, T], absolute position of each query.
      window: rows by position; see `Window`.
      entries: [B, N, D] compressed rows (or `Fp8Rows`), each both key and value, or None. A row nobody picks may hold
        anything where picks are `Indices`, anything finite otherwise; window rows likewise are finite even where empty.
      picks: which entries each query picks (`FirstN`, `Indices`, `Mask`, `MaskBits`; distinct per query), None with
        `entries`.
      sinks: fp32 [H], logits that take softmax weight but carry no value; not scaled. -inf disables.
      scale: multiplies q . k.
      return_lse: also return the log of the softmax's denominator, sinks included: fp32 [B, T, H], -inf where nothing
        is visible and the sink is -inf.
    Returns:
      [B, T, H, D] in q.dtype. Scores and softmax are fp32; weights are rounded to q.dtype before the value product,
      which accumulates in fp32. Zeros where nothing is visible.
    Raises:
      ValueError: the shapes disagree.
    Source: architecture 3.3; deepseek-ai/DeepSeek-V4-Flash inference/kernel.py for the rounding points.
    """
    check_shapes(q, positions, window, entries, picks, sinks)
    pools = [(dequantize_rows(window.rows, jnp.float32)[:, None], window.visible(positions))]
    if entries is not None and picks is not None:
        pools.append(picked_entries(entries, picks))
    masked = [jnp.where(seen[..., None], row, 0) for row, seen in pools]
    rows = jnp.concatenate(masked, axis=2)  # [B, T, C, D]
    seen = jnp.concatenate([seen for _, seen in pools], axis=2)[:, :, None]  # [B, T, 1, C]
    logits = jnp.einsum("BTHD,BTCD->BTHC", q.astype(jnp.float32), rows, precision="highest") * scale
    logits = jnp.where(seen, logits, -jnp.inf)
    peak = jnp.maximum(logits.max(-1), sinks)[..., None]
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sinks[:, None] - peak)
    out = jnp.einsum("BTHC,BTCD->BTHD", weights.astype(q.dtype).astype(jnp.float32), rows, precision="highest")
    out = (out / jnp.where(total == 0, 1.0, total)).astype(q.dtype)
    return (out, (jnp.log(total) + peak)[..., 0]) if return_lse else out
