"""Mixture of experts: hash or top-k routing, routed experts, a shared expert (architecture 6)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.cache import Step
from dsv4_jax.config import LayerSpec, ModelConfig
from dsv4_jax.dispatch import run_experts
from dsv4_jax.experts import mlp
from dsv4_jax.kernels import Kernels, XlaKernels
from dsv4_jax.linear import Buffer, matmul, weight
from dsv4_jax.numerics import Numerics
from dsv4_jax.schedule import IN_ORDER, AsyncSchedule
from dsv4_jax.sharding import SINGLE, Parallel
from pallas_kernels.routing import routing_weights

PLAIN = XlaKernels()


def router_scores(x: jax.Array, w: jax.Array) -> jax.Array:
    """sqrt(softplus(x . w)) in fp32: x [..., M], w [E, M] -> [..., E]."""
    logits = matmul(x.astype(jnp.float32), w.astype(jnp.float32))
    return jnp.sqrt(jax.nn.softplus(logits))


class Router(nnx.Module):
    """Hash layers look their experts up by token id; the others take the top k of biased scores."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, dtype, kernels: Kernels = PLAIN):
        self.kernels = kernels
        self.top_k, self.factor, self.hashed = config.num_experts_per_tok, config.routed_scaling_factor, spec.hashed
        self.weight = nnx.Param(jnp.zeros((config.n_routed_experts, config.hidden_size), dtype))
        if spec.hashed:
            self.tid2eid = Buffer(jnp.zeros((config.vocab_size, self.top_k), jnp.int32))
        else:
            self.e_score_correction_bias = nnx.Param(jnp.zeros((config.n_routed_experts,), jnp.float32))

    def __call__(self, x: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [n, M], tokens int32 [n] -> expert ids int32 [n, A] and their fp32 weights [n, A]."""
        scores = router_scores(x, self.weight[...])
        if not self.hashed:
            return self.kernels.route(scores, self.e_score_correction_bias[...], top_k=self.top_k, factor=self.factor)
        # Column by column: a TPU lays rows this short out by columns, and would copy the table to gather rows.
        index = jnp.stack([column[tokens] for column in self.tid2eid[...].T], axis=-1)
        return index, routing_weights(scores, index, self.factor)


class Experts(nnx.Module):
    """Routed experts, stacked."""

    def __init__(self, config: ModelConfig, kernels: Kernels, numerics: Numerics, dtype, parallel: Parallel = SINGLE):
        E, F, M = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        form = config.quantization.expert_format if config.quantization else "bf16"
        self.limit, self.kernels, self.numerics = config.swiglu_limit, kernels, numerics
        self.count, self.parallel = E, parallel
        self.gate_up_proj = weight((E, 2, F, M), dtype, config.quantization, form)
        self.down_proj = weight((E, M, F), dtype, config.quantization, form)

    def __call__(self, x: jax.Array, index: jax.Array, weights: jax.Array, real: jax.Array) -> jax.Array:
        """x [n, M], expert ids and weights [n, A], which tokens are real [n] -> fp32 [n, M]; see `run_experts`."""
        x = self.numerics.activations(x, self.gate_up_proj.get_value())  # once, not wherever a token is sent
        if self.parallel.expert_shards == 1:
            return self._run(x, index, weights, None)
        run = lambda x, index, weights: self._run(x, index, weights, self.count)
        return run_experts(x, index, weights, real, self.count, self.parallel, run)

    def _run(self, x: jax.Array, index: jax.Array, weights: jax.Array, routed: int | None) -> jax.Array:
        gate_up, down = self.gate_up_proj.get_value(), self.down_proj.get_value()
        return self.kernels.expert_mlp(x, index, weights, gate_up, down, self.limit, self.numerics, routed)


class SharedExpert(nnx.Module):
    """The expert every token visits; clamped as the routed ones are, never fp4."""

    def __init__(self, config: ModelConfig, kernels: Kernels, numerics: Numerics, dtype):
        F, M = config.moe_intermediate_size, config.hidden_size
        self.limit, self.kernels, self.numerics = config.swiglu_limit, kernels, numerics
        self.gate_up_proj = weight((2, F, M), dtype, config.quantization, "fp8")
        self.down_proj = weight((M, F), dtype, config.quantization, "fp8")

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_up, down = self.gate_up_proj.get_value(), self.down_proj.get_value()
        x = self.numerics.activations(x, gate_up)
        kernels = self.kernels
        return mlp(x, gate_up, down, self.limit, self.numerics, kernels.project, kernels.expert_hidden)


class SparseMoe(nnx.Module):
    """Routed experts plus the shared one, added in fp32 and rounded once."""

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
        self.schedule, self.parallel = schedule, parallel
        self.gate = Router(config, spec, dtype, kernels)
        self.experts = Experts(config, kernels, numerics, dtype, parallel)
        self.shared_experts = SharedExpert(config, kernels, numerics, dtype)

    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        """x [B, T, M] -> [B, T, M]."""
        flat, tokens, real = x.reshape(-1, x.shape[-1]), step.tokens.reshape(-1), step.real.reshape(-1)
        routed, shared = self.schedule.fork(
            lambda: self.experts(flat, *self.gate(flat, tokens), real), lambda: self.shared_experts(flat), lane=2
        )
        out = self.parallel.sum_model(routed + shared.astype(jnp.float32))
        return out.astype(x.dtype).reshape(x.shape)
