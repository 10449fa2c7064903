"""Attention: one template, three kinds of layer that differ in which compressed entries a query may read (section 3).

Layer kinds are subclasses; platforms are strategies (`kernels.py`). Neither knows the other.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.cache import LayerCache, Step, StoredRows, extend_window
from dsv4_jax.compressor import Compressor, visible_entries
from dsv4_jax.config import CSA, HCA, SLIDING, LayerSpec, ModelConfig
from dsv4_jax.indexer import Indexer
from dsv4_jax.kernels import AttentionKernels
from dsv4_jax.linear import RMSNorm, rms_norm, weight
from dsv4_jax.numerics import Numerics
from dsv4_jax.rope import RopeTable, Rotation, apply_rope
from pallas_kernels.sparse_mla import FirstN, Picks

Compressed = tuple[StoredRows | None, Picks | None]  # entries [B, N, D] and what each query picks of them


class Attention(nnx.Module, abc.ABC):
    """Multi-query latent attention with K = V, sinks and a grouped low-rank output projection."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, kernels: AttentionKernels, numerics: Numerics, dtype):
        heads, dim, quantization = config.num_attention_heads, config.head_dim, config.quantization
        self.heads, self.dim, self.groups, self.window = heads, dim, config.o_groups, config.sliding_window
        self.eps, self.ratio, self.rope_dim = config.rms_norm_eps, spec.ratio, config.qk_rope_head_dim
        self.kernels, self.numerics = kernels, numerics
        linear = lambda rows, columns: weight((rows, columns), dtype, quantization, "fp8")
        self.q_a_proj = linear(config.q_lora_rank, config.hidden_size)
        self.q_a_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = linear(heads * dim, config.q_lora_rank)
        self.kv_proj = linear(dim, config.hidden_size)
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps)
        self.sinks = nnx.Param(jnp.zeros((heads,), jnp.float32))
        self.o_a_proj = linear(config.o_groups * config.o_lora_rank, heads // config.o_groups * dim)
        self.o_b_proj = linear(config.hidden_size, config.o_groups * config.o_lora_rank)

    def __call__(self, x: jax.Array, rope: RopeTable, cache: LayerCache, step: Step) -> tuple[jax.Array, LayerCache]:
        """x [B, T, M] -> [B, T, M] and the layer's cache after this step."""
        rotation = rope(step.positions)
        latent = self.q_a_norm(self._project(x, self.q_a_proj))
        query = self._query(latent, rotation)
        kv = apply_rope(self.kv_norm(self._project(x, self.kv_proj)), rotation)
        kv = self.numerics.kv(kv, self.rope_dim)
        window, ring = extend_window(cache.window, kv, step, self.window)
        (entries, picks), cache = self.compress(x, latent, rotation, rope, cache, step)
        query, sinks = self._pad_heads(query)
        out = self.kernels.sparse_mla(query, step.positions, window, entries, picks, sinks, scale=self.dim**-0.5)[
            :, :, : self.heads
        ]
        out = self.kernels.output_projection(
            out, rotation, self.o_a_proj.get_value(), self.o_b_proj.get_value(), self.groups, self.numerics
        )
        return out, dataclasses.replace(cache, window=ring)

    @abc.abstractmethod
    def compress(
        self, x: jax.Array, latent: jax.Array, rotation: Rotation, rope: RopeTable, cache: LayerCache, step: Step
    ) -> tuple[Compressed, LayerCache]:
        """Write the entries this step completes; -> the entries on offer, each query's picks, and the cache."""

    def _project(self, x: jax.Array, w: nnx.Param) -> jax.Array:
        return self.kernels.project(self.numerics.activations(x, w.get_value()), w.get_value())

    def _query(self, latent: jax.Array, rotation: Rotation) -> jax.Array:
        """Latent [B, T, Q] -> [B, T, H, D], normed per head without a weight, then rotated."""
        q = self._project(latent, self.q_b_proj)
        q = rms_norm(q.reshape(*latent.shape[:2], self.heads, self.dim), None, self.eps)
        return apply_rope(q, jax.tree.map(lambda table: table[:, :, None], rotation))

    def _pad_heads(self, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Heads up to what the kernel wants: zero queries whose sinks are -inf."""
        extra = self.kernels.padded_heads(self.heads) - self.heads
        if not extra:
            return query, self.sinks[...]
        query = jnp.pad(query, ((0, 0), (0, 0), (0, extra), (0, 0)))
        return query, jnp.pad(self.sinks[...], (0, extra), constant_values=-jnp.inf)


class WindowAttention(Attention):
    """Sliding window only (ratio 0)."""

    def compress(self, x, latent, rotation, rope, cache, step):
        return (None, None), cache


class HcaAttention(Attention):
    """Heavily compressed attention: every visible entry is read."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, kernels: AttentionKernels, numerics: Numerics, dtype):
        super().__init__(config, spec, kernels, numerics, dtype)
        self.compressor = Compressor(config, spec, config.head_dim, dtype)

    def compress(self, x, latent, rotation, rope, cache, step):
        rounded = lambda entries: self.numerics.kv(entries, self.rope_dim)
        compressed = self.compressor(x, rope, cache.compressor, step, rounded)
        picks = FirstN(visible_entries(step, self.ratio))
        return (compressed.entries, picks), dataclasses.replace(cache, compressor=compressed)


class CsaAttention(Attention):
    """Compressed sparse attention: the indexer picks among overlapping entries."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, kernels: AttentionKernels, numerics: Numerics, dtype):
        super().__init__(config, spec, kernels, numerics, dtype)
        self.compressor = Compressor(config, spec, config.head_dim, dtype)
        self.indexer = Indexer(config, spec, kernels, numerics, dtype)

    def compress(self, x, latent, rotation, rope, cache, step):
        rounded = lambda entries: self.numerics.kv(entries, self.rope_dim)
        compressed = self.compressor(x, rope, cache.compressor, step, rounded)
        picks, keys = self.indexer(x, latent, rotation, rope, cache.indexer, step)
        return (compressed.entries, picks), dataclasses.replace(cache, compressor=compressed, indexer=keys)


ATTENTION: dict[str, Callable[..., Attention]] = {SLIDING: WindowAttention, CSA: CsaAttention, HCA: HcaAttention}
