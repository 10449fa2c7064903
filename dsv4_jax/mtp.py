"""MTP: one more decoder layer that reads the main streams and the next token, to predict the one after (section 7)."""

from __future__ import annotations

import jax
from flax import nnx

from dsv4_jax.cache import LayerCache, Step
from dsv4_jax.config import LayerSpec, ModelConfig
from dsv4_jax.hyper_connection import HyperHead
from dsv4_jax.kernels import Kernels
from dsv4_jax.layer import DecoderLayer, run_layer
from dsv4_jax.linear import RMSNorm, weight
from dsv4_jax.numerics import Numerics
from dsv4_jax.rope import Rotations
from dsv4_jax.schedule import IN_ORDER, AsyncSchedule
from dsv4_jax.sharding import SINGLE, Parallel


class MtpLayer(nnx.Module):
    """Own block, own collapse and norm; embedding and LM head are the main model's, passed in by it."""

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
        M = config.hidden_size
        self.kernels, self.numerics, self.schedule = kernels, numerics, schedule
        self.enorm = RMSNorm(M, config.rms_norm_eps, kernels)
        self.hnorm = RMSNorm(M, config.rms_norm_eps, kernels)
        self.e_proj = weight((M, M), dtype, config.quantization, "fp8")
        self.h_proj = weight((M, M), dtype, config.quantization, "fp8")
        self.block = DecoderLayer(config, spec, kernels, numerics, dtype, schedule, parallel)
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(M, config.rms_norm_eps, kernels)

    def __call__(
        self, streams: jax.Array, embedded: jax.Array, rotations: Rotations, cache: LayerCache, step: Step
    ) -> tuple[jax.Array, LayerCache]:
        """Main (or draft) streams [B, T, N, M] at position t and the embedding [B, T, M] of token t + 1.

        step.tokens are those next tokens, step.positions the t. -> this layer's streams, whose head predicts t + 2.
        """
        project = lambda x, w: self.kernels.project(self.numerics.activations(x, w), w)
        hidden, token = self.schedule.fork(
            lambda: project(self.hnorm(streams), self.h_proj.get_value()),
            lambda: project(self.enorm(embedded), self.e_proj.get_value()),
            lane=3,
        )
        return run_layer(self.block, token[:, :, None] + hidden, rotations, cache, step)
