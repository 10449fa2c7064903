"""What this machine allows: measured read bandwidth and matrix rate, and the bytes and FLOPs the model cannot avoid."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import CSA, SLIDING, LayerSpec, ModelConfig

READ_BYTES = 256 << 20  # well past any cache
GEMM_SIZE = 2048


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """Shortest of `repeats` runs after one warm-up; `call` must return only when the work is done."""
    call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _finish(call: Callable[..., jax.Array], *args: jax.Array) -> None:
    call(*args).block_until_ready()


def read_bandwidth(repeats: int = 4) -> dict[str, float]:
    """GB/s (1e9 bytes) at which each method reads 256 MiB of float32; the highest is the machine's floor."""
    rows = os.cpu_count() or 1
    host = np.ones((rows, READ_BYTES // 4 // rows), np.float32)
    device = jnp.asarray(host).reshape(-1, 4096)  # many rows, so that XLA splits the work
    vector = jnp.ones((4096,), jnp.float32)
    reductions = {
        "xla sum": jax.jit(lambda x: x.sum(axis=1)),
        "xla max": jax.jit(lambda x: x.max(axis=1)),
        "xla matvec": jax.jit(lambda x: x @ vector),
    }
    rates = {}
    for name, reduction in reductions.items():
        seconds = best_seconds(partial(_finish, reduction, device), repeats)
        rates[name] = device.nbytes / seconds / 1e9
    with ThreadPoolExecutor(rows) as pool:  # numpy lets go of the interpreter lock while it reduces
        seconds = best_seconds(lambda: list(pool.map(np.max, host)), repeats)
    return rates | {"numpy max": host.nbytes / seconds / 1e9}


def gemm_rate(repeats: int = 3) -> dict[str, float]:
    """GFLOP/s of a 2048 x 2048 x 2048 float32 product, by XLA and by numpy's BLAS."""
    host = np.random.default_rng(0).standard_normal((GEMM_SIZE, GEMM_SIZE), np.float32)
    device, product, flops = jnp.asarray(host), jax.jit(jnp.matmul), 2 * GEMM_SIZE**3
    return {
        "xla": flops / best_seconds(partial(_finish, product, device, device), repeats) / 1e9,
        "numpy": flops / best_seconds(lambda: host @ host, repeats) / 1e9,
    }


def hc_rows(config: ModelConfig) -> int:
    """Rows of hc_attn_fn and hc_ffn_fn: pre, post and comb."""
    return (2 + config.hc_mult) * config.hc_mult


def attention_elements(config: ModelConfig) -> int:
    """Elements of the five projections of one attention layer; o_a is block-diagonal, so heads x D x O in all."""
    queries = config.num_attention_heads * config.head_dim
    down = config.hidden_size * (config.q_lora_rank + config.head_dim)
    up = config.q_lora_rank * queries
    return down + up + queries * config.o_lora_rank + config.o_groups * config.o_lora_rank * config.hidden_size


def compressor_elements(config: ModelConfig, spec: LayerSpec, width: int) -> int:
    """Elements of wkv and wgate of a compressor whose entries are `width` wide."""
    return 2 * config.hidden_size * width * (2 if spec.kind == CSA else 1)


def indexer_elements(config: ModelConfig) -> int:
    """Elements of the indexer's query and head-weight projections (its compressor is counted apart)."""
    return config.index_n_heads * (config.q_lora_rank * config.index_head_dim + config.hidden_size)


def expert_elements(config: ModelConfig) -> int:
    """Elements of gate, up and down of one expert."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def active_experts(config: ModelConfig, batch: int) -> float:
    """Distinct routed experts a step of `batch` tokens reads, for independent, uniform routing."""
    share = config.num_experts_per_tok / config.n_routed_experts
    return config.n_routed_experts * (1 - (1 - share) ** batch)


def touched_bytes(config: ModelConfig, context: int, batch: int = 1, itemsize: int = 4) -> int:
    """Bytes a decode step must read: one new token per row, `context` tokens in the cache of each, all in `itemsize`.

    Each weight is read once, K and V are one row, and the indexer's queries and keys count only where there are more
    visible entries than it may pick. Writes, activations, `ape` and the compressors' norms are left out, so the true
    minimum is a little higher.
    """
    M, N = config.hidden_size, config.hc_mult
    once = config.vocab_size * M + M + N * N * M + N + 1  # LM head, final norm, hc_head
    weights = once + batch * M  # embedding rows
    layers = sum(_layer_weights(config, spec, context, batch) for spec in config.layers)
    cache = batch * sum(_cache_elements(config, spec, context) for spec in config.layers)
    return round(itemsize * (weights + layers + cache))


def _layer_weights(config: ModelConfig, spec: LayerSpec, context: int, batch: int) -> float:
    M, D, N = config.hidden_size, config.head_dim, config.hc_mult
    hc = 2 * (hc_rows(config) * (N * M + 1) + 3)
    norms = 2 * M + config.q_lora_rank + D + config.num_attention_heads
    bias = batch * config.num_experts_per_tok if spec.hashed else config.n_routed_experts  # tid2eid rows, or gate.bias
    moe = config.n_routed_experts * M + bias + expert_elements(config) * (1 + active_experts(config, batch))
    total = attention_elements(config) + hc + norms + moe
    if spec.kind != SLIDING:
        total += compressor_elements(config, spec, D)
    if spec.kind == CSA:
        total += compressor_elements(config, spec, config.index_head_dim)
        if (context + 1) // spec.ratio > config.index_topk:
            total += indexer_elements(config)
    return total


def _cache_elements(config: ModelConfig, spec: LayerSpec, context: int) -> int:
    """Window rows, picked entries, scanned index keys, and compressor rows averaged over the steps of one entry."""
    D = config.head_dim
    total = min(config.sliding_window, context + 1) * D
    if spec.kind == SLIDING:
        return total
    visible = (context + 1) // spec.ratio
    if spec.kind != CSA:
        return total + visible * D + 2 * D  # an entry reads `ratio` rows of kv and gate, once in `ratio` steps
    total += min(visible, config.index_topk) * D + 4 * (D + config.index_head_dim)  # as above, over two windows
    return total + (visible * config.index_head_dim if visible > config.index_topk else 0)


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs (2 per multiply-add) of the products of one prefill of `tokens` from an empty cache.

    Attention counts visible pairs alone, the indexer those queries that see more entries than they may pick, and the
    head the last position. Norms, softmax, Sinkhorn and the mixing of streams are left out.
    """
    M, N = config.hidden_size, config.hc_mult
    macs = config.vocab_size * M + N * N * M  # once: head and its collapse
    for spec in config.layers:
        per_token = attention_elements(config) + 2 * hc_rows(config) * N * M
        per_token += config.n_routed_experts * M + expert_elements(config) * (1 + config.num_experts_per_tok)
        if spec.kind != SLIDING:
            per_token += compressor_elements(config, spec, config.head_dim)
        if spec.kind == CSA:
            per_token += compressor_elements(config, spec, config.index_head_dim)
        macs += tokens * per_token + _pair_macs(config, spec, tokens)
    return 2 * macs


def _pair_macs(config: ModelConfig, spec: LayerSpec, tokens: int) -> int:
    """Multiply-adds of scores and weighted sums over the rows each query attends to, and of the indexer's scores."""
    position = np.arange(tokens, dtype=np.int64)
    rows, indexer = np.minimum(position + 1, config.sliding_window), 0
    if spec.kind != SLIDING:
        visible = (position + 1) // spec.ratio
        rows = rows + (np.minimum(visible, config.index_topk) if spec.kind == CSA else visible)
        if spec.kind == CSA:
            choosing = visible[visible > config.index_topk]
            indexer = int(choosing.sum()) * config.index_n_heads * (config.index_head_dim + 1)
            indexer += len(choosing) * indexer_elements(config)
    return int(rows.sum()) * 2 * config.num_attention_heads * config.head_dim + indexer
