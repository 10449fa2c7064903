"""The model's own forward pass, laid out for gradients: no gather, no ring, no sort, so nothing turns into a scatter.

Whole rows from position 0, with the parameters of a `DeepseekV4` and the same sums as its portable strategy. Window
attention runs in blocks, compressed entries are one product under a mask, every expert sees every token.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.attention import Attention, CsaAttention, HcaAttention
from dsv4_jax.compressor import Compressor
from dsv4_jax.hyper_connection import HyperConnection, HyperHead
from dsv4_jax.layer import DecoderLayer
from dsv4_jax.model import DeepseekV4
from dsv4_jax.moe import Router, SparseMoe, router_scores
from dsv4_jax.numerics import Numerics
from dsv4_jax.rope import RopeTable, Rotation
from pallas_kernels.expert_rows import clamped_swiglu
from pallas_kernels.index_topk.xla import kth_largest
from pallas_kernels.rms_norm import rms_norm


@dataclass
class Trace:
    """What a pass leaves behind: load of each top-k layer's experts, and per CSA layer how well its indexer aims."""

    loads: list[jax.Array]  # fp32 [E], sums to 1
    index_losses: list[jax.Array]  # mean KL(attention mass || indexer) in nats
    recalls: list[jax.Array]  # share of the entries' attention mass that the picks hold, fp32 [B, T]


def forward(model: DeepseekV4, tokens: jax.Array, *, index: str = "select") -> tuple[jax.Array, Trace]:
    """tokens int32 [B, T] -> streams [B, T, N, M] after the last layer, and the trace.

    index: "select" reads the entries that the indexer picks; "align" and "off" read all that are visible, as early in
      training, and "off" leaves the indexer out.
    Raises:
      ValueError: T is not a multiple of the window.
    """
    if tokens.shape[1] % model.config.sliding_window:
        raise ValueError(
            f"rows of {tokens.shape[1]} tokens are no multiple of the window {model.config.sliding_window}"
        )
    trace = Trace([], [], [])
    streams = jnp.repeat(embed(model, tokens)[:, :, None], model.config.hc_mult, axis=2)
    for layer, spec in zip(model.layers, model.config.layers, strict=True):
        rope = model.rope_compress if spec.ratio else model.rope_main
        streams = run_layer(layer, streams, rope, tokens, trace, index)
    return streams, trace


def draft(model: DeepseekV4, streams: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Trace]:
    """The first MTP layer over main streams [B, T, N, M] and the tokens [B, T] that follow each: its streams."""
    mtp, trace = model.mtp[0], Trace([], [], [])
    token = linear(mtp.enorm(embed(model, tokens)), mtp.e_proj.get_value(), mtp.numerics)
    hidden = linear(mtp.hnorm(streams), mtp.h_proj.get_value(), mtp.numerics)
    return run_layer(mtp.block, token[:, :, None] + hidden, model.rope_main, tokens, trace, "off"), trace


def logits(head: HyperHead, norm, lm_head: nnx.Param, streams: jax.Array) -> jax.Array:
    """Streams [B, T, N, M] -> fp32 [B, T, V]."""
    return norm(collapse_head(head, streams)) @ lm_head[...].T


def embed(model: DeepseekV4, tokens: jax.Array) -> jax.Array:
    return jax.nn.one_hot(tokens, model.config.vocab_size) @ model.embed_tokens[...]


def linear(x: jax.Array, w: jax.Array, numerics: Numerics) -> jax.Array:
    """x [..., K], rounded, times w [N, K]."""
    return numerics.activations(x, w) @ w.T


def run_layer(layer: DecoderLayer, streams, rope: RopeTable, tokens, trace: Trace, index: str) -> jax.Array:
    x, post, comb = collapse(layer.attn_hc, streams)
    out = attention(layer.self_attn, layer.input_layernorm(x), rope, trace, index)
    streams = expand(out, streams, post, comb)
    x, post, comb = collapse(layer.ffn_hc, streams)
    return expand(moe(layer.mlp, layer.post_attention_layernorm(x), tokens, trace), streams, post, comb)


# ---- hyper-connections ----


def mix(streams: jax.Array, fn: jax.Array, eps: float) -> jax.Array:
    """Rows of fn times all N * M values of a token over their RMS, tokens last: -> [rows, B, T]."""
    flat = streams.reshape(*streams.shape[:2], -1)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=-1) + eps)
    return jnp.moveaxis(flat @ fn.T, -1, 0) * scale


def collapse(hc: HyperConnection, streams: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sub-block input [B, T, M], post [B, T, N], comb [B, T, N, N]."""
    n = hc.n
    base, scale = hc.base[...][:, None, None], hc.scale[...]
    mixed = mix(streams, hc.fn[...], hc.rms_eps)
    pre = jax.nn.sigmoid(mixed[:n] * scale[0] + base[:n]) + hc.eps
    post = 2 * jax.nn.sigmoid(mixed[n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mixed[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n, *streams.shape[:2])
    comb = sinkhorn(comb, hc.iterations, hc.eps)
    return weigh(streams, pre), jnp.moveaxis(post, 0, -1), jnp.moveaxis(comb, (0, 1), (-2, -1))


def weigh(streams: jax.Array, weights: jax.Array) -> jax.Array:
    """Streams [B, T, N, M] times weights [N, B, T], summed over N."""
    return jnp.einsum("btnm,btn->btm", streams, jnp.moveaxis(weights, 0, -1))


def sinkhorn(x: jax.Array, iterations: int, eps: float) -> jax.Array:
    """`streams.sinkhorn` of [N, N, ...] with the matrix in front."""
    x = jax.nn.softmax(x, axis=1) + eps
    x = x / (x.sum(0, keepdims=True) + eps)
    for _ in range(iterations - 1):
        x = x / (x.sum(1, keepdims=True) + eps)
        x = x / (x.sum(0, keepdims=True) + eps)
    return x


def expand(out: jax.Array, streams: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
    return post[..., None] * out[:, :, None] + jnp.einsum("btjm,btjk->btkm", streams, comb)


def collapse_head(head: HyperHead, streams: jax.Array) -> jax.Array:
    mixed = mix(streams, head.fn[...], head.rms_eps)
    return weigh(streams, jax.nn.sigmoid(mixed * head.scale[...] + head.base[...][:, None, None]) + head.eps)


# ---- attention ----


def rotate(x: jax.Array, rotation: Rotation, *, inverse: bool = False) -> jax.Array:
    """`rope.apply_rope` as a product: x [B, T, ..., D], tables [T, R // 2]."""
    half = rotation.cos.shape[-1]
    still, turning = x[..., : -2 * half], x[..., -2 * half :]
    shape = (x.shape[1], *(1,) * (x.ndim - 3), 2 * half)
    cos, sin = (jnp.repeat(table, 2, axis=-1).reshape(shape) for table in (rotation.cos, rotation.sin))
    swap = jnp.kron(jnp.eye(half), jnp.array([[0.0, 1.0], [-1.0, 0.0]]))  # (a, b) -> (-b, a)
    turned = turning * cos + (turning @ swap) * (-sin if inverse else sin)
    return jnp.concatenate([still, turned], axis=-1)


def attention(attn: Attention, x: jax.Array, rope: RopeTable, trace: Trace, index: str) -> jax.Array:
    """x [B, T, M] -> [B, T, M]."""
    B, T, _ = x.shape
    rotation, numerics = rope(jnp.arange(T)), attn.numerics
    latent = attn.q_a_norm(linear(x, attn.q_a_proj.get_value(), numerics))
    rows = rotate(attn.kv_norm(linear(x, attn.kv_proj.get_value(), numerics)), rotation)
    rows = numerics.kv(rows, attn.rope_dim)
    q = linear(latent, attn.q_b_proj.get_value(), numerics).reshape(B, T, attn.heads, attn.dim)
    q = rotate(rms_norm(q, None, eps=attn.eps), rotation)
    entries, visible, scores = rows[:, :0], jnp.ones((T, 0), bool), None
    if isinstance(attn, (CsaAttention, HcaAttention)):
        entries = numerics.kv(pool(attn.compressor, x, rope), attn.rope_dim)
        visible = jnp.arange(entries.shape[1]) < ((jnp.arange(T) + 1) // attn.ratio)[:, None]
    picked = visible[None]
    if isinstance(attn, CsaAttention) and index != "off":
        scores = index_scores(attn, x, latent, rope, rotation)
        chosen = pick(scores, visible, attn.indexer.top_k)
        picked = chosen if index == "select" else picked
    out, mass = attend(q, rows, entries, visible, picked, attn.sinks[...], attn.window, attn.dim**-0.5)
    if scores is not None:
        trace.index_losses.append(index_loss(mass, scores, visible))
        trace.recalls.append(recall(mass, chosen))
    out = rotate(out, rotation, inverse=True).reshape(B, T, attn.groups, -1)
    o_a = attn.o_a_proj.get_value().reshape(attn.groups, -1, out.shape[-1])
    out = jnp.concatenate([out[:, :, g] @ o_a[g].T for g in range(attn.groups)], axis=-1)
    return linear(out, attn.o_b_proj.get_value(), numerics)


def pool(compressor: Compressor, x: jax.Array, rope: RopeTable) -> jax.Array:
    """x [B, T, M] -> entries [B, T // ratio, dim], normed and rotated."""
    B, T, _ = x.shape
    ratio, dim, count = compressor.ratio, compressor.dim, T // compressor.ratio
    x = x[:, : count * ratio]
    kv, gate = ((x @ w[...].T).reshape(B, count, ratio, -1) for w in (compressor.kv_proj, compressor.gate_proj))
    gate = gate + compressor.position_bias[...]
    if compressor.overlap:
        kv, gate = with_previous(kv, dim, 0.0), with_previous(gate, dim, -jnp.inf)
    weights = jax.nn.softmax(gate, axis=2)
    entries = compressor.kv_norm((weights * kv).sum(2))
    return rotate(entries, rope(jnp.arange(count) * ratio))


def with_previous(x: jax.Array, dim: int, blank: float) -> jax.Array:
    """[B, E, r, 2 * dim] -> [B, E, 2r, dim]: the first channels of the window before, then the last of the own."""
    before = jnp.pad(x[:, :-1, :, :dim], ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=blank)
    return jnp.concatenate([before, x[..., dim:]], axis=2)


def attend(q, rows, entries, visible, picked, sinks, window: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """Window rows and picked entries under one softmax.

    q [B, T, H, D], rows [B, T, D], entries [B, N, D], visible bool [T, N], picked bool [B or 1, T, N]
    -> [B, T, H, D], and the weight that visible entries get or would get if they were picked, summed over heads,
    [B, T, N], without a gradient.
    """
    B, T, H, D = q.shape
    blocks = T // window
    own = rows.reshape(B, blocks, window, D)
    band = jnp.concatenate([jnp.pad(own[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0))), own], axis=2)
    place, query = jnp.arange(2 * window) - window, jnp.arange(window)[:, None]
    near = (place <= query) & (place > query - window)
    near = near & ((place >= 0) | (jnp.arange(blocks) > 0)[:, None, None])  # [blocks, W, 2W]
    close = jnp.einsum("bnwhd,bnkd->bnwhk", q.reshape(B, blocks, window, H, D), band) * scale
    close = jnp.where(near[:, :, None], close, -jnp.inf).reshape(B, T, H, -1)
    far = jnp.where(visible[:, None], jnp.einsum("bthd,bnd->bthn", q, entries) * scale, -jnp.inf)
    peak = jnp.maximum(close.max(-1), sinks)
    peak = jnp.maximum(peak, far.max(-1, initial=-jnp.inf))
    peak = jax.lax.stop_gradient(peak)[..., None]
    close, far = jnp.exp(close - peak), jnp.exp(far - peak)
    kept = far * picked[:, :, None]
    total = close.sum(-1, keepdims=True) + kept.sum(-1, keepdims=True) + jnp.exp(sinks[:, None] - peak)
    out = jnp.einsum("bnwhk,bnkd->bnwhd", close.reshape(B, blocks, window, H, -1), band).reshape(q.shape)
    out = out + jnp.einsum("bthn,bnd->bthd", kept, entries)
    return out / total, jax.lax.stop_gradient((far / total).sum(2))


# ---- indexer ----


def index_scores(attn: CsaAttention, x, latent, rope: RopeTable, rotation: Rotation) -> jax.Array:
    """fp32 [B, T, N]; its gradient stops at what it reads, so that it follows the attention and never steers it."""
    indexer, (B, T, _) = attn.indexer, x.shape
    x, latent = jax.lax.stop_gradient((x, latent))
    keys = indexer.numerics.index(pool(indexer.compressor, x, rope))
    q = linear(latent, indexer.q_b_proj.get_value(), indexer.numerics).reshape(B, T, indexer.heads, indexer.dim)
    q = indexer.numerics.index(rotate(q, rotation))
    weights = (x @ indexer.weights_proj[...].T) * (indexer.dim**-0.5 * indexer.heads**-0.5)
    dots = jax.nn.relu(jnp.einsum("bthd,bnd->bhtn", q, keys))
    return (dots * jnp.moveaxis(weights, -1, 1)[..., None]).sum(1)


def pick(scores: jax.Array, visible: jax.Array, top_k: int) -> jax.Array:
    """bool [B, T, N]: the top_k best visible entries, the lower index winning a tie."""
    scores = jax.lax.stop_gradient(jnp.where(visible, scores, -jnp.inf))
    if scores.shape[-1] <= top_k:
        return scores > -jnp.inf
    last = kth_largest(scores, top_k)[..., None]
    tied = (scores == last) & (scores > -jnp.inf)
    left = top_k - (scores > last).sum(-1, keepdims=True)
    return (scores > last) | (tied & (jnp.cumsum(tied, axis=-1) <= left))


def index_loss(mass, scores, visible) -> jax.Array:
    """Mean KL(the heads' summed attention over visible entries || the indexer's softmax), in nats."""
    share = mass / jnp.maximum(mass.sum(-1, keepdims=True), 1e-9)
    log_q = jax.nn.log_softmax(jnp.where(visible, scores, -1e30), axis=-1)
    kl = jnp.where(visible & (share > 0), share * (jnp.log(jnp.maximum(share, 1e-20)) - log_q), 0.0).sum(-1)
    return kl.mean()


def recall(mass, chosen) -> jax.Array:
    return jnp.where(chosen, mass, 0.0).sum(-1) / jnp.maximum(mass.sum(-1), 1e-9)


# ---- experts ----


def moe(block: SparseMoe, x: jax.Array, tokens: jax.Array, trace: Trace) -> jax.Array:
    """x [B, T, M] -> routed experts plus the shared one, [B, T, M]."""
    experts, shared = block.experts, block.shared_experts
    flat, numerics = x.reshape(-1, x.shape[-1]), experts.numerics
    weights = route(block.gate, flat, tokens.reshape(-1), trace)
    both = jnp.concatenate([experts.gate_up_proj.get_value(), shared.gate_up_proj.get_value()[None]])
    downs = jnp.concatenate([experts.down_proj.get_value(), shared.down_proj.get_value()[None]])  # [E + 1, M, F]
    weights = jnp.concatenate([weights, jnp.ones_like(weights[:, :1])], axis=1)
    E, _, F, M = both.shape
    hidden = linear(flat, jnp.moveaxis(both, 1, 0).reshape(-1, M), numerics).reshape(-1, 2, E, F)
    hidden = clamped_swiglu(hidden[:, 0], hidden[:, 1], experts.limit) * weights[..., None]
    hidden = numerics.activations(hidden, downs).reshape(-1, E * F)
    return (hidden @ jnp.moveaxis(downs, 1, 2).reshape(E * F, M)).reshape(x.shape)


def route(gate: Router, x: jax.Array, tokens: jax.Array, trace: Trace) -> jax.Array:
    """Routing weights [n, E], zero for experts that are not chosen."""
    scores = router_scores(x, gate.weight[...])
    experts = scores.shape[1]
    if gate.hashed:
        chosen = jax.nn.one_hot(gate.tid2eid[...][tokens], experts).sum(1)
    else:
        biased = jax.lax.stop_gradient(scores + gate.e_score_correction_bias[...])
        chosen = jnp.zeros_like(biased)
        for _ in range(gate.top_k):
            chosen += jax.nn.one_hot(jnp.where(chosen > 0, -jnp.inf, biased).argmax(-1), experts)
        trace.loads.append(chosen.mean(0) / gate.top_k)
    weights = scores * chosen
    return weights / weights.sum(-1, keepdims=True) * gate.factor
