"""Attention: one template, three kinds of layer that differ in which compressed entries a query may read (section 3).

Layer kinds are subclasses; platforms are strategies (`kernels.py`). Neither knows the other.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.cache import LayerCache, Step, StoredRows, as_stored, extend_window
from dsv4_jax.compressor import Compressor, visible_entries
from dsv4_jax.config import CSA, HCA, SLIDING, LayerSpec, ModelConfig
from dsv4_jax.indexer import Indexer
from dsv4_jax.kernels import AttentionKernels
from dsv4_jax.linear import RMSNorm, weight
from dsv4_jax.numerics import Numerics
from dsv4_jax.rope import Rotation, Rotations
from dsv4_jax.schedule import IN_ORDER, AsyncSchedule
from dsv4_jax.sharding import SINGLE, Parallel
from pallas_kernels.kv_rows import Fp8Rows
from pallas_kernels.sparse_mla import FirstN, Picks

Branches = tuple[Callable[[], Any], ...]


class Attention(nnx.Module, abc.ABC):
    """Multi-query latent attention with K = V, sinks and a grouped low-rank output projection."""

    def __init__(
        self,
        config: ModelConfig,
        spec: LayerSpec,
        kernels: AttentionKernels,
        numerics: Numerics,
        dtype,
        schedule: AsyncSchedule = IN_ORDER,
        parallel: Parallel = SINGLE,
    ):
        heads, dim, quantization = config.num_attention_heads, config.head_dim, config.quantization
        self.heads, self.groups = heads // parallel.model, config.o_groups // parallel.model  # on this device
        self.dim, self.window, self.parallel = dim, config.sliding_window, parallel
        self.eps, self.ratio, self.rope_dim = config.rms_norm_eps, spec.ratio, config.qk_rope_head_dim
        self.kernels, self.numerics, self.schedule = kernels, numerics, schedule
        linear = lambda rows, columns: weight((rows, columns), dtype, quantization, "fp8")
        self.q_a_proj = linear(config.q_lora_rank, config.hidden_size)
        self.q_a_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps, kernels)
        self.q_b_proj = linear(heads * dim, config.q_lora_rank)
        self.kv_proj = linear(dim, config.hidden_size)
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps, kernels)
        self.sinks = nnx.Param(jnp.zeros((heads,), jnp.float32))
        self.o_a_proj = linear(config.o_groups * config.o_lora_rank, heads // config.o_groups * dim)
        self.o_b_proj = linear(config.hidden_size, config.o_groups * config.o_lora_rank)

    def __call__(
        self, x: jax.Array, rotations: Rotations, cache: LayerCache, step: Step
    ) -> tuple[jax.Array, LayerCache]:
        """x [B, T, M] -> [B, T, M] and the layer's cache after this step."""
        rotation, fork = rotations.tokens, self.schedule.fork
        (latent, rows), *inputs = fork(lambda: self._latents(x), *self.inputs(x, cache, step))
        compress = self.compress(inputs, latent, rotations, cache, step)
        query, kv, *compressed = fork(
            lambda: self._query(latent, rotation),
            lambda: self._store(rows, self.kv_norm, rotation, cache.window),
            *compress,
        )
        window, ring = extend_window(cache.window, kv, step, self.window, self.kernels.put_rows)
        entries, picks, cache = self.gather(compressed, cache, step)
        query, sinks = self._pad_heads(query)
        out = self.kernels.sparse_mla(query, step.positions, window, entries, picks, sinks, scale=self.dim**-0.5)
        o_a, o_b = self.o_a_proj.get_value(), self.o_b_proj.get_value()
        out = self.kernels.output_projection(out[:, :, : self.heads], rotation, o_a, o_b, self.groups, self.numerics)
        return self.parallel.sum_model(out), dataclasses.replace(cache, window=ring)

    @abc.abstractmethod
    def inputs(self, x: jax.Array, cache: LayerCache, step: Step) -> Branches:
        """What compressor and indexer project of x [B, T, M], as branches that may run beside the main projections."""

    @abc.abstractmethod
    def compress(
        self, inputs: list, latent: jax.Array, rotations: Rotations, cache: LayerCache, step: Step
    ) -> Branches:
        """Branches, to run beside the query path, that write the entries this step completes and pick among them."""

    @abc.abstractmethod
    def gather(
        self, compressed: list, cache: LayerCache, step: Step
    ) -> tuple[StoredRows | None, Picks | None, LayerCache]:
        """What those branches gave -> the entries on offer, each query's picks, and the cache."""

    def _latents(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, T, M] -> the queries' latent [B, T, Q], normed, and KV rows [B, T, D] as they are projected."""
        latent, rows = self._project(x, self.q_a_proj, self.kv_proj)
        return self.q_a_norm(latent), rows

    def _store(self, rows: jax.Array, norm: RMSNorm, rotation: Rotation, held: StoredRows) -> StoredRows:
        """KV rows [B, T, D] as projected or pooled -> normed, rotated, rounded, in the form in which `held` is."""
        if isinstance(held, Fp8Rows):  # whose rounding is that of every numerics
            return self.kernels.store_rows(rows, norm.weight[...], rotation, norm.eps)
        return as_stored(self.numerics.kv_rows(rows, norm, rotation), held)

    def _project(self, x: jax.Array, *weights: nnx.Param) -> tuple[jax.Array, ...]:
        """x times each weight; all are quantised alike, or none is."""
        values = [w.get_value() for w in weights]
        return self.kernels.project_each(self.numerics.activations(x, values[0]), *values)

    def _query(self, latent: jax.Array, rotation: Rotation) -> jax.Array:
        """Latent [B, T, Q] -> [B, T, H, D], normed per head without a weight, then rotated."""
        (q,) = self._project(latent, self.q_b_proj)
        q = q.reshape(*latent.shape[:2], self.heads, self.dim)
        return self.kernels.norm_heads(q, rotation, self.eps)

    def _pad_heads(self, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Heads up to what the kernel wants: zero queries whose sinks are -inf."""
        extra = self.kernels.padded_heads(self.heads) - self.heads
        if not extra:
            return query, self.sinks[...]
        query = jnp.pad(query, ((0, 0), (0, 0), (0, extra), (0, 0)))
        return query, jnp.pad(self.sinks[...], (0, extra), constant_values=-jnp.inf)


class WindowAttention(Attention):
    """Sliding window only (ratio 0)."""

    def inputs(self, x, cache, step):
        return ()

    def compress(self, inputs, latent, rotations, cache, step):
        return ()

    def gather(self, compressed, cache, step):
        return None, None, cache


class HcaAttention(Attention):
    """Heavily compressed attention: every visible entry is read."""

    def __init__(
        self,
        config: ModelConfig,
        spec: LayerSpec,
        kernels: AttentionKernels,
        numerics: Numerics,
        dtype,
        schedule: AsyncSchedule = IN_ORDER,
        parallel: Parallel = SINGLE,
    ):
        super().__init__(config, spec, kernels, numerics, dtype, schedule, parallel)
        self.compressor = Compressor(config, spec, kernels, config.head_dim, dtype)

    def inputs(self, x, cache, step):
        return (lambda: self.compressor.project(x, step),)

    def compress(self, inputs, latent, rotations, cache, step):
        return (lambda: self.compressor(inputs[0], rotations.entries, cache.compressor, step, self._store),)

    def gather(self, compressed, cache, step):
        picks = FirstN(visible_entries(step, self.ratio))
        return compressed[0].entries, picks, dataclasses.replace(cache, compressor=compressed[0])


class CsaAttention(Attention):
    """Compressed sparse attention: the indexer picks among overlapping entries, where there are enough to pick from."""

    def __init__(
        self,
        config: ModelConfig,
        spec: LayerSpec,
        kernels: AttentionKernels,
        numerics: Numerics,
        dtype,
        schedule: AsyncSchedule = IN_ORDER,
        parallel: Parallel = SINGLE,
    ):
        super().__init__(config, spec, kernels, numerics, dtype, schedule, parallel)
        self.compressor = Compressor(config, spec, kernels, config.head_dim, dtype)
        self.indexer = Indexer(config, spec, kernels, numerics, dtype, parallel)

    def inputs(self, x, cache, step):
        main, keys = lambda: self.compressor.project(x, step), self.indexer.compressor
        if cache.indexer is None:  # the cache holds no more entries than are picked
            return (main,)
        return main, lambda: self.indexer.weigh(x), lambda: keys.project(x, step)

    def compress(self, inputs, latent, rotations, cache, step):
        main = lambda: self.compressor(inputs[0], rotations.entries, cache.compressor, step, self._store)
        if cache.indexer is None:
            return (main,)
        _, weights, keys = inputs
        return lambda: self.indexer(
            weights, keys, latent, rotations.tokens, rotations.entries, cache.indexer, step
        ), main

    def gather(self, compressed, cache, step):
        *index, main = compressed
        picks, keys = index[0] if index else (FirstN(visible_entries(step, self.ratio)), None)
        return main.entries, picks, dataclasses.replace(cache, compressor=main, indexer=keys)


ATTENTION: dict[str, Callable[..., Attention]] = {SLIDING: WindowAttention, CSA: CsaAttention, HCA: HcaAttention}
