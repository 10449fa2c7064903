"""The cache: a pytree addressed by absolute position, with one length cursor per sequence.

Nothing but `Cache.length` says what is valid. A row at or past the cursor is rubbish that no query can see and that
the next write replaces, so padding, finished rows and rejected drafts cost nothing: the cursor does not move past them.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dsv4_jax.config import CSA, SLIDING, LayerSpec, ModelConfig
from pallas_kernels.sparse_mla import Window

SMALL_STEP = 16  # up to this many rows a ring is written row by row, in place; more rewrite the ring in one pass


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressorCache:
    """kv, gate: fp32 rings [B, R, width] of per-token rows (gate includes the position bias); entries: [B, N, d]."""

    kv: jax.Array
    gate: jax.Array
    entries: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """window: ring [B, S, D] of K = V rows; the rest only where the layer has them."""

    window: jax.Array
    compressor: CompressorCache | None = None
    indexer: CompressorCache | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """layers: one LayerCache per main layer; length int32 [B]: tokens held by each sequence."""

    layers: tuple[LayerCache, ...]
    length: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """The tokens of one call: `count` of T are real, at positions start .. start + count - 1; the rest is padding."""

    tokens: jax.Array  # int32 [B, T]
    start: jax.Array  # int32 [B]
    count: jax.Array  # int32 [B]

    @property
    def positions(self) -> jax.Array:
        return self.start[:, None] + jnp.arange(self.tokens.shape[1], dtype=jnp.int32)

    @property
    def end(self) -> jax.Array:
        return self.start + self.count


def init_cache(config: ModelConfig, batch: int, max_tokens: int, dtype, *, drafts: int = 0) -> Cache:
    """An empty cache for `batch` sequences of up to `max_tokens`; `drafts` is ring slack for rejected tokens."""
    layers = tuple(init_layer_cache(config, spec, batch, max_tokens, dtype, drafts=drafts) for spec in config.layers)
    return Cache(layers, jnp.zeros((batch,), jnp.int32))


def init_layer_cache(
    config: ModelConfig, spec: LayerSpec, batch: int, max_tokens: int, dtype, *, drafts: int = 0
) -> LayerCache:
    """The cache of one layer of kind `spec`."""

    def compressor(width: int) -> CompressorCache:
        windows = 2 if spec.kind == CSA else 1
        ring = (batch, windows * spec.ratio + drafts, windows * width)
        entries = jnp.zeros((batch, max(max_tokens // spec.ratio, 1), width), dtype)
        return CompressorCache(jnp.zeros(ring, jnp.float32), jnp.zeros(ring, jnp.float32), entries)

    return LayerCache(
        window=jnp.zeros((batch, config.sliding_window + drafts, config.head_dim), dtype),
        compressor=None if spec.kind == SLIDING else compressor(config.head_dim),
        indexer=compressor(config.index_head_dim) if spec.kind == CSA else None,
    )


def write_ring(ring: jax.Array, rows: jax.Array, step: Step) -> jax.Array:
    """Put the real rows of [B, T, W] into ring [B, S, W], position p in slot p % S; padding writes nothing."""
    slots, T = ring.shape[1], rows.shape[1]
    rows = rows.astype(ring.dtype)
    if T <= min(SMALL_STEP, slots):
        real = jnp.arange(T) < step.count[:, None]
        slot = jnp.where(real, step.positions % slots, slots)  # out of range = dropped
        return jax.vmap(lambda r, x, s: r.at[s].set(x, mode="drop"))(ring, rows, slot)
    newest = step.end[:, None] - 1
    held = newest - (newest - jnp.arange(slots)) % slots  # the newest position of each slot once this step is written
    index = jnp.clip(held - step.start[:, None], 0, T - 1)
    fresh = jnp.take_along_axis(rows, index[..., None], axis=1)
    return jnp.where((held >= step.start[:, None])[..., None], fresh, ring)


def read_rows(ring: jax.Array, rows: jax.Array, step: Step, positions: jax.Array) -> jax.Array:
    """Rows at absolute `positions` [B, K]: from this step's `rows`, or from the ring as it was before the step."""
    slots = ring.shape[1]
    fresh = positions >= step.start[:, None]
    index = jnp.where(fresh, slots + positions - step.start[:, None], positions % slots)
    return jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(jnp.concatenate([ring, rows.astype(ring.dtype)], 1), index)


def extend_window(ring: jax.Array, rows: jax.Array, step: Step, size: int) -> tuple[Window, jax.Array]:
    """What this step's queries can see of the window, and the ring after the step."""
    slots, T = ring.shape[1], rows.shape[1]
    written = write_ring(ring, rows, step)
    if T <= slots - size + 1:  # the ring still holds everything the first query needs
        newest = step.end[:, None] - 1
        held = newest - (newest - jnp.arange(slots)) % slots
        return Window(written, held, size), written
    before = step.start[:, None] - (size - 1) + jnp.arange(size - 1, dtype=jnp.int32)
    band = jnp.concatenate([read_rows(ring, rows, step, before), rows.astype(ring.dtype)], axis=1)
    return Window(band, jnp.concatenate([before, step.positions], axis=1), size, is_band=True), written


def write_entries(entries: jax.Array, fresh: jax.Array, first: jax.Array, complete: jax.Array) -> jax.Array:
    """Put the complete ones of fresh [B, E, d] at indices first .. first + E - 1 of entries [B, N, d]."""
    index = first[:, None] + jnp.arange(fresh.shape[1])
    index = jnp.where(complete, index, entries.shape[1] + jnp.arange(fresh.shape[1]))  # out of range = dropped
    put = lambda e, x, i: e.at[i].set(x, mode="drop", unique_indices=True)
    return jax.vmap(put)(entries, fresh.astype(entries.dtype), index)
