"""The cache: a pytree addressed by absolute position, with one length cursor per sequence.

Nothing but `Cache.length` says what is valid. A row at or past the cursor is rubbish that no query can see and that
the next write replaces, so padding, finished rows and rejected drafts cost nothing: the cursor does not move past them.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsv4_jax.config import CSA, HCA, SLIDING, LayerSpec, ModelConfig
from dsv4_jax.quantized import QuantizedArray, quantize_fp8
from pallas_kernels.formats import decode_e8m0
from pallas_kernels.index_rows import Fp4Rows, empty_index_rows, quantize_index_rows
from pallas_kernels.kv_rows import Fp8Rows, Rows, empty_rows, quantize_rows
from pallas_kernels.put_rows import put_rows
from pallas_kernels.sparse_mla import Window

SMALL_STEP = 16  # up to this many rows a ring is written row by row, in place; more rewrite the ring in one pass


@dataclass(frozen=True)
class CacheFormat:
    """How KV rows and index keys are held: in `dtype`, or, with dtype "fp8", in 8 bits (index keys in `index`)."""

    dtype: jax.typing.DTypeLike | Literal["fp8"]
    index: str = "fp8"  # or "fp4", without loss where index keys are rounded so anyway

    def empty_rows(self, shape: tuple[int, ...], rope_dim: int) -> Rows:
        return empty_rows(shape, rope_dim) if self.dtype == "fp8" else jnp.zeros(shape, self.dtype)

    def empty_keys(self, shape: tuple[int, ...]) -> StoredRows:
        if self.dtype != "fp8":
            return jnp.zeros(shape, self.dtype)
        if self.index == "fp4":
            return empty_index_rows(shape)
        *lead, dim = shape
        scale = jnp.zeros((*lead, 1), jnp.float32)
        return QuantizedArray(jnp.zeros(shape, jnp.float8_e4m3fn), scale, (1, dim))


StoredRows = jax.Array | Fp8Rows | Fp4Rows | QuantizedArray  # [B, S, D], however it is held
Put = Callable[[Any, Any, jax.Array], Any]  # see `put_rows`


def as_stored(rows: jax.Array, like: StoredRows) -> StoredRows:
    """Wide rows [B, T, D] in the form in which `like` holds its own."""
    if isinstance(like, Fp8Rows):
        return quantize_rows(rows, like.rope.shape[-1])
    if isinstance(like, Fp4Rows):
        return quantize_index_rows(rows)
    if not isinstance(like, QuantizedArray):
        return rows.astype(like.dtype)
    coded = quantize_fp8(rows, like.block)
    assert coded.scale is not None
    return QuantizedArray(coded.data, decode_e8m0(coded.scale), like.block)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressorCache:
    """kv, gate: fp32 rings [B, R, width] of per-token rows (gate includes the position bias); entries: [B, N, d]."""

    kv: jax.Array
    gate: jax.Array
    entries: Any  # StoredRows: KV rows of a main compressor, index keys of an indexer's


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """window: ring [B, S, D] of K = V rows; the rest only where the layer has them, and the indexer has a choice."""

    window: Rows
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
    def real(self) -> jax.Array:
        """bool [B, T]: which tokens are not padding."""
        return jnp.arange(self.tokens.shape[1]) < self.count[:, None]

    @property
    def end(self) -> jax.Array:
        return self.start + self.count


def init_cache(config: ModelConfig, batch: int, max_tokens: int, form: CacheFormat, *, drafts: int = 0) -> Cache:
    """An empty cache for `batch` sequences of up to `max_tokens`; `drafts` is ring slack for rejected tokens."""
    layers = tuple(init_layer_cache(config, spec, batch, max_tokens, form, drafts=drafts) for spec in config.layers)
    return Cache(layers, jnp.zeros((batch,), jnp.int32))


def init_layer_cache(
    config: ModelConfig, spec: LayerSpec, batch: int, max_tokens: int, form: CacheFormat, *, drafts: int = 0
) -> LayerCache:
    """The cache of one layer of kind `spec`."""
    dim, index_dim, rope_dim = config.head_dim, config.index_head_dim, config.qk_rope_head_dim

    def compressor(entries: StoredRows) -> CompressorCache:
        windows = 2 if spec.kind == CSA else 1
        ring = (batch, windows * spec.ratio + drafts, windows * entries.shape[-1])
        return CompressorCache(jnp.zeros(ring, jnp.float32), jnp.zeros(ring, jnp.float32), entries)

    window = form.empty_rows((batch, config.sliding_window + drafts, dim), rope_dim)
    if spec.kind == SLIDING:
        return LayerCache(window)
    held = (batch, max(max_tokens // spec.ratio, 1))
    main = compressor(form.empty_rows((*held, dim), rope_dim))
    if spec.kind == HCA or held[1] <= config.index_topk:  # every entry is read: nobody asks for keys
        return LayerCache(window, main)
    return LayerCache(window, main, compressor(form.empty_keys((*held, index_dim))))


@dataclass(frozen=True)
class CacheBytes:
    """What one sequence takes: fixed parts (windows, MTP layers' included, and compressor rows), and per token."""

    windows: int
    compressor_state: int
    per_token_of: dict[str, float]  # one layer of each kind
    layers: dict[str, int]  # how many there are of each kind

    @property
    def fixed(self) -> int:
        return self.windows + self.compressor_state

    @property
    def per_token(self) -> float:
        return sum(self.per_token_of[kind] * count for kind, count in self.layers.items())


def cache_bytes(config: ModelConfig, form: CacheFormat, *, drafts: int = 0) -> CacheBytes:
    """Bytes of one sequence's cache that is long enough for an indexer's choice; nothing is allocated."""
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    windows, state = 0, 0
    per_token_of, layers = dict.fromkeys((SLIDING, CSA, HCA), 0.0), collections.Counter[str]()
    for spec in (*config.layers, *config.mtp_layers):
        tokens = spec.ratio * (config.index_topk + 1)
        one = jax.eval_shape(functools.partial(init_layer_cache, config, spec, 1, tokens, form, drafts=drafts))
        compressors = [c for c in (one.compressor, one.indexer) if c is not None]
        windows += size(one.window)
        state += sum(size((c.kv, c.gate)) for c in compressors)
        layers[spec.kind] += 1
        if compressors:
            per_token_of[spec.kind] = sum(size(c.entries) for c in compressors) / tokens
    return CacheBytes(windows, state, per_token_of, dict(layers))


def write_ring(ring: Any, rows: Any, step: Step, put: Put = put_rows):
    """Put the real rows of [B, T, W], held as the ring's, into ring [B, S, W]: position p in slot p % S.

    Ring and rows may be trees of such arrays; `put` is a platform's `put_rows`.
    """
    slots, T = jax.tree.leaves(ring)[0].shape[1], step.tokens.shape[1]
    if T <= min(SMALL_STEP, slots):
        return put(ring, rows, jnp.where(step.real, step.positions % slots, slots))  # out of range = dropped
    return jax.tree.map(lambda old, new: _write_ring(old, new, step), ring, rows)


def _write_ring(ring: jax.Array, rows: jax.Array, step: Step) -> jax.Array:
    slots, T = ring.shape[1], rows.shape[1]
    newest = step.end[:, None] - 1
    held = newest - (newest - jnp.arange(slots)) % slots  # the newest position of each slot once this step is written
    index = jnp.clip(held - step.start[:, None], 0, T - 1)
    fresh = jnp.take_along_axis(rows, index[..., None], axis=1)
    return jnp.where((held >= step.start[:, None])[..., None], fresh, ring)


def read_rows(ring: StoredRows, rows: StoredRows, step: Step, positions: jax.Array):
    """Rows at absolute `positions` [B, K]: from this step's `rows`, or from the ring as it was before the step."""
    return jax.tree.map(lambda old, new: _read_rows(old, new, step, positions), ring, rows)


def _read_rows(ring: jax.Array, rows: jax.Array, step: Step, positions: jax.Array) -> jax.Array:
    slots = ring.shape[1]
    fresh = positions >= step.start[:, None]
    index = jnp.where(fresh, slots + positions - step.start[:, None], positions % slots)
    return jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(jnp.concatenate([ring, rows], 1), index)


def extend_window(ring: Rows, stored: Rows, step: Step, size: int, put: Put = put_rows) -> tuple[Window, Rows]:
    """What this step's queries see of the window, with its rows [B, T, D] as stored, and the ring after the step."""
    slots, T = ring.shape[1], stored.shape[1]
    written = write_ring(ring, stored, step, put)
    if T <= slots - size + 1:  # the ring still holds everything the first query needs
        newest = step.end[:, None] - 1
        held = newest - (newest - jnp.arange(slots)) % slots
        return Window(written, held, size), written
    before = step.start[:, None] - (size - 1) + jnp.arange(size - 1, dtype=jnp.int32)
    joined = lambda old, new: jnp.concatenate([old, new], axis=1)
    band = jax.tree.map(joined, read_rows(ring, stored, step, before), stored)
    return Window(band, jnp.concatenate([before, step.positions], axis=1), size, is_band=True), written


def write_entries(
    entries: StoredRows, fresh: StoredRows, first: jax.Array, complete: jax.Array, put: Put = put_rows
) -> StoredRows:
    """Put the complete ones of fresh [B, E, d], as stored, at indices first .. first + E - 1 of entries [B, N, d]."""
    index = first[:, None] + jnp.arange(fresh.shape[1])
    return put(entries, fresh, jnp.where(complete, index, entries.shape[1]))  # the rest is dropped
