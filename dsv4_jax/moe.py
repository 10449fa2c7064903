"""Mixture of experts: hash or top-k routing, grouped expert products, a shared expert (architecture 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.config import LayerSpec, ModelConfig
from dsv4_jax.linear import Buffer, linear, matmul, weight
from dsv4_jax.numerics import Numerics
from dsv4_jax.quantized import Weight, dequantize
from dsv4_jax.schedule import IN_ORDER, AsyncSchedule

MAX_BLOCK_ROWS = 128  # rows of one expert's product; larger blocks only add padding


def clamped_swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit); the gate has no lower clamp."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def mlp(
    x: jax.Array, gate_up: Weight, down: Weight, limit: float, numerics: Numerics, weights: jax.Array | None = None
) -> jax.Array:
    """One expert: x [..., M], rounded already, gate_up [2, F, M], down [M, F] -> [..., M] in x.dtype.

    `weights` [..., 1], the routing weight, goes in before the down projection and its rounding, as in the reference.
    """
    both = dequantize(gate_up, x.dtype).reshape(-1, x.shape[-1])
    gate, up = jnp.split(linear(x, both).astype(jnp.float32), 2, axis=-1)
    hidden = clamped_swiglu(gate, up, limit)
    hidden = (hidden if weights is None else hidden * weights).astype(x.dtype)
    return linear(numerics.activations(hidden, down), down)


def router_scores(x: jax.Array, w: jax.Array) -> jax.Array:
    """sqrt(softplus(x . w)) in fp32: x [..., M], w [E, M] -> [..., E]."""
    logits = matmul(x.astype(jnp.float32), w.astype(jnp.float32))
    return jnp.sqrt(jax.nn.softplus(logits))


def routing_weights(scores: jax.Array, index: jax.Array, factor: float) -> jax.Array:
    """Un-biased scores of the chosen experts, normalised to sum to `factor`."""
    chosen = jnp.take_along_axis(scores, index, axis=-1)
    return chosen / chosen.sum(-1, keepdims=True) * factor


class Router(nnx.Module):
    """Hash layers look their experts up by token id; the others take the top k of biased scores."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, dtype):
        self.top_k, self.factor, self.hashed = config.num_experts_per_tok, config.routed_scaling_factor, spec.hashed
        self.weight = nnx.Param(jnp.zeros((config.n_routed_experts, config.hidden_size), dtype))
        if spec.hashed:
            self.tid2eid = Buffer(jnp.zeros((config.vocab_size, self.top_k), jnp.int32))
        else:
            self.e_score_correction_bias = nnx.Param(jnp.zeros((config.n_routed_experts,), jnp.float32))

    def __call__(self, x: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [n, M], tokens int32 [n] -> expert ids int32 [n, A] and their fp32 weights [n, A]."""
        scores = router_scores(x, self.weight[...])
        if self.hashed:
            index = self.tid2eid[...][tokens]
        else:
            index = jax.lax.top_k(scores + self.e_score_correction_bias[...], self.top_k)[1]
        return index, routing_weights(scores, index, self.factor)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """Pairs (token, choice) sorted by expert and cut into blocks of R rows, none of which spans two experts.

    expert [K]: expert of each block; pair [K, R]: which pair sits in each row (P = none);
    used: how many blocks have rows; slot [P]: the row, counted over all blocks, where each pair went.
    """

    expert: jax.Array
    pair: jax.Array
    used: jax.Array
    slot: jax.Array


def make_blocks(index: jax.Array, experts: int, rows: int) -> Blocks:
    """Expert ids [P] -> Blocks; at most P / rows + min(P, experts) of them exist."""
    P = index.shape[0]
    order = jnp.argsort(index, stable=True)
    counts = jnp.bincount(index, length=experts)
    starts = jnp.cumsum(counts) - counts
    last_block = jnp.cumsum(-(-counts // rows))
    first_block = last_block + counts // -rows
    block = jnp.arange(P // rows + min(P, experts))
    expert = jnp.minimum(jnp.searchsorted(last_block, block, side="right"), experts - 1)
    rank = (block - first_block[expert])[:, None] * rows + jnp.arange(rows)
    pair = jnp.where(rank < counts[expert][:, None], order.at[starts[expert][:, None] + rank].get(mode="clip"), P)
    rank_of_pair = jnp.argsort(order) - starts[index]
    slot = first_block[index] * rows + rank_of_pair
    return Blocks(expert, pair, last_block[-1], slot)


def block_rows(pairs: int, experts: int) -> int:
    """Rows a block: the mean load of an expert, rounded up to a power of two; 1 where experts are hardly shared."""
    mean = pairs / experts
    return 1 if mean <= 1 else min(MAX_BLOCK_ROWS, 1 << math.ceil(math.log2(mean)))


def expert_mlp(x, index, weights, gate_up: Weight, down: Weight, limit: float, numerics: Numerics) -> jax.Array:
    """The routed experts' sum: only the products that were routed, expert by expert.

    Args:
      x: [n, M] tokens.
      index, weights: [n, A] expert ids and fp32 routing weights.
      gate_up, down: stacked [E, 2, F, M] and [E, M, F], quantised or not; one expert is expanded at a time.
    Returns:
      fp32 [n, M]. A token's sum has a fixed order, so it does not depend on the other tokens.
    """
    (n, A), experts = index.shape, down.shape[0]
    P, rows = n * A, block_rows(n * A, experts)
    x = numerics.activations(x, gate_up)
    flat = index.reshape(P)
    if rows == 1:
        blocks = Blocks(flat, jnp.arange(P)[:, None], jnp.int32(P), jnp.arange(P))
    else:
        blocks = make_blocks(flat, experts, rows)
    padded = jnp.concatenate([weights.reshape(P), jnp.zeros((1,), weights.dtype)])

    def run_block(_, block):
        expert, pair, is_used = block

        def run():
            token = jnp.minimum(pair, P - 1) // A
            return mlp(x[token], gate_up[expert], down[expert], limit, numerics, padded[pair][:, None])

        return None, jax.lax.cond(is_used, run, lambda: jnp.zeros((rows, x.shape[1]), x.dtype)) if rows > 1 else run()

    used = jnp.arange(blocks.expert.shape[0]) < blocks.used
    _, out = jax.lax.scan(run_block, None, (blocks.expert, blocks.pair, used))
    picked = out.reshape(-1, x.shape[1])[blocks.slot].reshape(n, A, -1)
    return picked.astype(jnp.float32).sum(1)


class Experts(nnx.Module):
    """Routed experts, stacked."""

    def __init__(self, config: ModelConfig, numerics: Numerics, dtype):
        E, F, M = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        form = config.quantization.expert_format if config.quantization else "bf16"
        self.limit, self.numerics = config.swiglu_limit, numerics
        self.gate_up_proj = weight((E, 2, F, M), dtype, config.quantization, form)
        self.down_proj = weight((E, M, F), dtype, config.quantization, form)

    def __call__(self, x: jax.Array, index: jax.Array, weights: jax.Array) -> jax.Array:
        gate_up, down = self.gate_up_proj.get_value(), self.down_proj.get_value()
        return expert_mlp(x, index, weights, gate_up, down, self.limit, self.numerics)


class SharedExpert(nnx.Module):
    """The expert every token visits; clamped as the routed ones are, never fp4."""

    def __init__(self, config: ModelConfig, numerics: Numerics, dtype):
        F, M = config.moe_intermediate_size, config.hidden_size
        self.limit, self.numerics = config.swiglu_limit, numerics
        self.gate_up_proj = weight((2, F, M), dtype, config.quantization, "fp8")
        self.down_proj = weight((M, F), dtype, config.quantization, "fp8")

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_up, down = self.gate_up_proj.get_value(), self.down_proj.get_value()
        return mlp(self.numerics.activations(x, gate_up), gate_up, down, self.limit, self.numerics)


class SparseMoe(nnx.Module):
    """Routed experts plus the shared one, added in fp32 and rounded once."""

    def __init__(
        self, config: ModelConfig, spec: LayerSpec, numerics: Numerics, dtype, schedule: AsyncSchedule = IN_ORDER
    ):
        self.schedule = schedule
        self.gate = Router(config, spec, dtype)
        self.experts = Experts(config, numerics, dtype)
        self.shared_experts = SharedExpert(config, numerics, dtype)

    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """x [B, T, M], tokens int32 [B, T] -> [B, T, M]."""
        flat = x.reshape(-1, x.shape[-1])
        routed, shared = self.schedule.fork(
            lambda: self.experts(flat, *self.gate(flat, tokens.reshape(-1))), lambda: self.shared_experts(flat), lane=2
        )
        return (routed + shared.astype(jnp.float32)).astype(x.dtype).reshape(x.shape)
