"""Lightning indexer: small heads score the compressed entries; the best `index_topk` are read (architecture 5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.cache import CompressorCache, Step, StoredRows, as_stored
from dsv4_jax.compressor import Compressor, Projected, visible_entries
from dsv4_jax.config import LayerSpec, ModelConfig
from dsv4_jax.kernels import AttentionKernels
from dsv4_jax.linear import RMSNorm, weight
from dsv4_jax.numerics import Numerics
from dsv4_jax.rope import Rotation
from dsv4_jax.sharding import SINGLE, Parallel
from pallas_kernels.index_rows import Fp4Rows
from pallas_kernels.sparse_mla import Picks


class Indexer(nnx.Module):
    """Scores sum_h w_h relu(q_h . k_i) with its own compressor for the keys."""

    def __init__(
        self,
        config: ModelConfig,
        spec: LayerSpec,
        kernels: AttentionKernels,
        numerics: Numerics,
        dtype,
        parallel: Parallel = SINGLE,
    ):
        heads, dim = config.index_n_heads, config.index_head_dim
        self.heads, self.dim, self.top_k, self.kernels = heads, dim, config.index_topk, kernels
        self.ratio, self.numerics, self.parallel = spec.ratio, numerics, parallel
        self.q_b_proj = weight((heads * dim, config.q_lora_rank), dtype, config.quantization, "fp8")
        self.weights_proj = nnx.Param(jnp.zeros((heads, config.hidden_size), dtype))
        self.compressor = Compressor(config, spec, kernels, dim, dtype)

    def weigh(self, x: jax.Array) -> jax.Array:
        """x [B, T, M] -> the weight of each index head, scaled, [B, T, H] in x.dtype."""
        return (self.kernels.project(x, self.weights_proj[...]) * (self.dim**-0.5 * self.heads**-0.5)).astype(x.dtype)

    def __call__(
        self,
        weights: jax.Array,
        projected: Projected,
        latent: jax.Array,
        rotation: Rotation,
        of_entries: Rotation,
        cache: CompressorCache,
        step: Step,
    ) -> tuple[Picks, CompressorCache]:
        """What `weigh` and `compressor.project` gave, and the normed query latent [B, T, Q].

        rotation, of_entries: of the queries, and of the keys that they complete.
        -> the entries each query picks, and the cache.
        """
        cache = self.compressor(projected, of_entries, cache, step, self._store)
        visible = visible_entries(step, self.ratio)
        inputs = (latent, weights, rotation, visible)
        latent, weights, rotation, mine = jax.tree.map(self.parallel.split_sequence, inputs)
        latent = self.numerics.activations(latent, self.q_b_proj.get_value())
        q = self.kernels.project(latent, self.q_b_proj.get_value()).reshape(*latent.shape[:2], self.heads, self.dim)
        q = self.numerics.rotated_index(q, jax.tree.map(lambda table: table[:, :, None], rotation))
        picks = self.kernels.pick_entries(q, weights, cache.entries, mine, top_k=self.top_k)
        return jax.tree.map(lambda x: self.parallel.join_sequence(x, visible.shape[1]), picks), cache

    def _store(self, keys: jax.Array, norm: RMSNorm, rotation: Rotation, held: StoredRows) -> StoredRows:
        """Pooled keys [B, E, D] -> normed, rotated, rounded, in the form in which `held` is."""
        if isinstance(held, Fp4Rows):
            return self.numerics.index_rows(norm(keys), rotation)
        return as_stored(self.numerics.rotated_index(norm(keys), rotation), held)
