"""DecoderLayer: attention and experts, each between two hyper-connections (architecture 2)."""

from __future__ import annotations

import jax
from flax import nnx

from dsv4_jax.attention import ATTENTION
from dsv4_jax.cache import LayerCache, Step
from dsv4_jax.config import LayerSpec, ModelConfig
from dsv4_jax.hyper_connection import HyperConnection
from dsv4_jax.kernels import Kernels
from dsv4_jax.linear import RMSNorm
from dsv4_jax.moe import SparseMoe
from dsv4_jax.numerics import Numerics
from dsv4_jax.rope import Rotations
from dsv4_jax.schedule import IN_ORDER, AsyncSchedule
from dsv4_jax.sharding import SINGLE, Parallel


class DecoderLayer(nnx.Module):
    """One layer of any kind; it stores no index, so layers of a kind share one trace."""

    def __init__(
        self,
        config: ModelConfig,
        spec: LayerSpec,
        kernels: Kernels,
        numerics: Numerics,
        dtype,
        schedule: AsyncSchedule = IN_ORDER,
        parallel: Parallel = SINGLE,
    ):
        self.attn_hc = HyperConnection(config, kernels)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ATTENTION[spec.kind](config, spec, kernels, numerics, dtype, schedule, parallel)
        self.ffn_hc = HyperConnection(config, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoe(config, spec, kernels, numerics, dtype, schedule, parallel)

    def __call__(
        self, streams: jax.Array, rotations: Rotations, cache: LayerCache, step: Step
    ) -> tuple[jax.Array, LayerCache]:
        """Streams [B, T, N, M] -> streams and the layer's cache after this step."""
        x, mixing = self.attn_hc.collapse(streams, self.input_layernorm)
        out, cache = self.self_attn(x, rotations, cache, step)
        streams = self.attn_hc.expand(out, streams, mixing)
        x, mixing = self.ffn_hc.collapse(streams, self.post_attention_layernorm)
        out = self.mlp(x, step)
        return self.ffn_hc.expand(out, streams, mixing), cache


@jax.jit
def run_layer(layer: DecoderLayer, streams, rotations: Rotations, cache: LayerCache, step: Step):
    """`layer(...)` under its own jit: a model of 43 layers traces each kind once."""
    return layer(streams, rotations, cache, step)
