"""Compressors: every `ratio` tokens become one entry, a softmax-weighted sum per channel (architecture 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.cache import CompressorCache, Step, StoredRows, read_rows, write_entries, write_ring
from dsv4_jax.config import CSA, LayerSpec, ModelConfig
from dsv4_jax.kernels import AttentionKernels
from dsv4_jax.linear import RMSNorm
from dsv4_jax.rope import Rotation

Projected = tuple[jax.Array, jax.Array]  # kv and gate (with its position bias) of this step's tokens
# Entries [B, E, dim], their norm, their rotation, and the rows they will be put among -> the entries as those are held.
Store = Callable[[jax.Array, RMSNorm, Rotation, StoredRows], StoredRows]


class Compressor(nnx.Module):
    """Pools rows of width `dim`; with overlap (CSA) an entry also reads the window before its own.

    A token then has two halves: channels [:dim] feed the next entry, channels [dim:] its own.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, kernels: AttentionKernels, dim: int, dtype):
        self.kernels = kernels
        self.ratio, self.dim, self.overlap, self.dtype = spec.ratio, dim, spec.kind == CSA, dtype
        width = dim * (2 if self.overlap else 1)
        self.kv_proj = nnx.Param(jnp.zeros((width, config.hidden_size), dtype))
        self.gate_proj = nnx.Param(jnp.zeros((width, config.hidden_size), dtype))
        self.position_bias = nnx.Param(jnp.zeros((spec.ratio, width), jnp.float32))
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps, kernels)

    def project(self, x: jax.Array, step: Step) -> Projected:
        """x [B, T, M] -> this step's rows, fp32 [B, T, width], never rounded."""
        kv, gate = self.kernels.matmul_each(x, self.kv_proj[...], self.gate_proj[...])
        return kv, gate + self.position_bias[...][step.positions % self.ratio]

    def __call__(
        self,
        projected: Projected,
        rotation: Rotation,
        cache: CompressorCache,
        step: Step,
        store: Store,
    ) -> CompressorCache:
        """What `project` gave -> the cache with these rows and every entry that they complete.

        rotation: at the positions of `entry_index`.
        store: norms and rotates entries, in the form in which those before them are held.
        """
        T, index = projected[0].shape[1], entry_index(step, self.ratio)
        complete = (index + 1) * self.ratio <= step.end[:, None]
        finish = lambda pooled: store(pooled, self.kv_norm, rotation, cache.entries)
        kv, gate = write_ring((cache.kv, cache.gate), projected, step, self.kernels.put_rows)
        if self.kernels.pools_rings and self._holds_windows(kv.shape[1], T):
            options: dict[str, Any] = {"ratio": self.ratio, "overlap": self.overlap, "dtype": self.dtype}
            fresh = finish(self.kernels.pool_window(kv, gate, step.start, step.end, **options)[:, None])
        elif T < self.ratio:  # most steps complete nothing
            pool = lambda: finish(self._pool(projected, index, cache, step))
            blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pool))
            fresh = jax.lax.cond(complete.any(), pool, lambda: blank)
        else:
            fresh = finish(self._pool(projected, index, cache, step))
        entries = write_entries(cache.entries, fresh, index[:, 0], complete, self.kernels.put_rows)
        return CompressorCache(kv, gate, entries)

    def _holds_windows(self, slots: int, T: int) -> bool:
        """Whether T tokens complete one entry at most, whose rows are all in the ring after they are written."""
        return T <= min(self.ratio, slots - self.ratio * (1 + self.overlap) + 1)

    def _pool(self, projected: Projected, index, cache: CompressorCache, step: Step) -> jax.Array:
        """Entries `index` [B, E] -> [B, E, dim], neither normed nor rotated; the rings are as before the step."""
        first = index * self.ratio
        rings = zip((cache.kv, cache.gate), projected, strict=True)
        rows, gates = (self._window_rows(ring, new, first, step) for ring, new in rings)
        if self.overlap:  # entry 0 has no window before its own
            absent = (first == 0)[..., None] & (jnp.arange(2 * self.ratio) < self.ratio)
            gates = jnp.where(absent[..., None], -jnp.inf, gates)
        return jnp.sum(jax.nn.softmax(gates, axis=2) * rows, axis=2).astype(self.dtype)

    def _window_rows(self, ring, new, first, step: Step) -> jax.Array:
        """[B, E, rows, dim] of one per-token quantity: the window before (its first half of channels), then the own."""
        read = lambda offset: read_rows(
            ring, new, step, (first[..., None] + offset + jnp.arange(self.ratio)).reshape(first.shape[0], -1)
        ).reshape(*first.shape, self.ratio, -1)
        if not self.overlap:
            return read(0)
        return jnp.concatenate([read(-self.ratio)[..., : self.dim], read(0)[..., self.dim :]], axis=2)


def entry_index(step: Step, ratio: int) -> jax.Array:
    """int32 [B, ceil(T / ratio)]: the entries that T tokens may complete; entry i is at position i * ratio."""
    count = math.ceil(step.tokens.shape[1] / ratio)
    return (step.start // ratio)[:, None] + jnp.arange(count, dtype=jnp.int32)


def visible_entries(step: Step, ratio: int) -> jax.Array:
    """int32 [B, T]: how many entries each query may see; the one its own token completes is among them."""
    return (step.positions + 1) // ratio
