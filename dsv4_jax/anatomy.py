"""Look inside a model at work: which rows each query reads, where tokens are routed, how streams are mixed.

Nothing is computed a second way: the layers themselves run, with a strategy and hyper-connections that also write down
what passes through them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache import LayerCache, Step
from dsv4_jax.config import CSA, HCA, SLIDING, LayerSpec
from dsv4_jax.hyper_connection import HyperConnection
from dsv4_jax.kernels import XlaKernels
from dsv4_jax.layer import DecoderLayer
from dsv4_jax.model import DeepseekV4
from dsv4_jax.rope import Rotations
from dsv4_jax.streams import split_mix, stream_mix
from pallas_kernels.kv_rows import dequantize_rows
from pallas_kernels.sparse_mla import FirstN, Indices, sparse_mla_xla
from pallas_kernels.sparse_mla.reference import as_mask

KINDS = {SLIDING: "sliding", CSA: "CSA", HCA: "HCA"}


@dataclass(frozen=True)
class Mixing:
    """One hyper-connection at each of T tokens, fp32.

    mix: [T, (2 + N) N], what its three parts are made of; pre: [T, N], weight of each stream in the sub-block's input;
    post: [T, N], weight of its output in each stream; comb: [T, N, N], comb[t, j, k] carries stream j to stream k.
    """

    mix: np.ndarray
    pre: np.ndarray
    post: np.ndarray
    comb: np.ndarray


@dataclass(frozen=True)
class LayerView:
    """What one layer did to T tokens from position 0 on.

    spec: its kind and ratio; streams: fp32 [T, N, M] after it.
    window: bool [T, T], which tokens' rows each query reads in the window.
    rows: [T, D], the tokens' KV rows as attention reads them.
    entries: [E, D], the compressed ones; picked: bool [T, E], which of them each query reads; mass: fp32 [T, E], the
      softmax weight, summed over heads, that each visible entry has where all are read. None in a sliding layer.
    experts: int32 [T, A], routed to, with fp32 weights [T, A]; hidden: [T, M], what the experts are given.
    attn_hc, ffn_hc: the mixing around both sub-blocks.
    """

    spec: LayerSpec
    streams: np.ndarray
    window: np.ndarray
    rows: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    hidden: np.ndarray
    attn_hc: Mixing
    ffn_hc: Mixing
    entries: np.ndarray | None = None
    picked: np.ndarray | None = None
    mass: np.ndarray | None = None

    @property
    def kind(self) -> str:
        """The layer's kind by its short name, one of KINDS."""
        return KINDS[self.spec.kind]

    def spans(self) -> np.ndarray:
        """int [E, 2]: the tokens first .. last that each entry was made of."""
        if self.entries is None:
            raise ValueError("a sliding layer has no compressed entries, so they span nothing; ask another layer")
        first = np.arange(len(self.entries)) * self.spec.ratio
        before = self.spec.ratio if self.spec.kind == CSA else 0  # a CSA entry also reads the window before its own
        return np.stack([np.maximum(first - before, 0), first + self.spec.ratio - 1], axis=1)


@dataclass(frozen=True, eq=False)
class _Recorder(XlaKernels):
    """The portable strategy, which keeps what it is asked to work on (of row 0)."""

    ratio: int
    seen: dict[str, Any] = field(default_factory=dict)

    def sparse_mla(self, q, positions, window, entries, picks, sinks, *, scale: float):
        T = q.shape[1]
        slot = jnp.where(window.positions[0] < 0, T, window.positions[0])  # empty rows fall off the end
        put = lambda rows, width: jnp.zeros((T, width), rows.dtype).at[slot].set(rows, mode="drop")
        rows = dequantize_rows(window.rows, jnp.float32)[0]
        self.seen.update({"window": put(window.visible(positions)[0].T, T).T, "rows": put(rows, rows.shape[-1])})
        if entries is not None:
            visible = (positions + 1) // self.ratio
            everything = FirstN(visible)
            _, lse = sparse_mla_xla(q, positions, window, entries, everything, sinks, scale=scale, return_lse=True)
            wide = dequantize_rows(entries, jnp.float32)
            logits = jnp.einsum("TND,ED->TNE", q[0].astype(jnp.float32), wide[0], precision="highest") * scale
            mass = jnp.exp(logits - lse[0][..., None]).sum(1)
            is_visible = jnp.arange(wide.shape[1]) < visible[0][:, None]
            picked = is_visible if isinstance(picks, FirstN) else picked_mask(picks, wide.shape[1])[0]
            self.seen.update({"entries": wide[0], "mass": jnp.where(is_visible, mass, 0.0), "picked": picked})
        return super().sparse_mla(q, positions, window, entries, picks, sinks, scale=scale)

    def expert_mlp(self, x, index, weights, *rest, **options):
        self.seen.update({"hidden": x, "experts": index, "weights": weights})
        return super().expert_mlp(x, index, weights, *rest, **options)


def picked_mask(picks, entries: int) -> jax.Array:
    """Any picks but `FirstN` -> bool [B, T, entries]."""
    if not isinstance(picks, Indices):
        return as_mask(picks)
    B, T, _ = picks.index.shape
    index = jnp.where(picks.index < 0, entries, picks.index)
    put = lambda mask, i: mask.at[i].set(True, mode="drop")
    return jax.vmap(jax.vmap(put))(jnp.zeros((B, T, entries), bool), index)


def _watch(hc: HyperConnection, seen: dict[str, Any], name: str) -> None:
    """Let `hc` note its mixing under `name` whenever it collapses streams."""
    plain = hc.collapse

    def collapse(streams, norm=None):
        mix = stream_mix(streams, hc.fn[...], hc.rms_eps)
        pre, post, comb = split_mix(mix, hc.base[...], hc.scale[...], hc.n, hc.iterations, hc.eps)
        seen[name] = tuple(x[0] for x in (mix, pre, post, comb))
        return plain(streams, norm)

    hc.collapse = collapse  # type: ignore[method-assign]


@jax.jit
def _run_layer(layer: DecoderLayer, streams, rotations: Rotations, cache: LayerCache, step: Step):
    """`layer(...)`, and what was seen in it; `layer` is this trace's own copy, to be rewired at will."""
    recorder = _Recorder(layer.self_attn.ratio)
    layer.self_attn.kernels = recorder
    if hasattr(layer.self_attn, "indexer"):
        layer.self_attn.indexer.kernels = recorder
    layer.mlp.experts.kernels = recorder
    _watch(layer.attn_hc, recorder.seen, "attn_hc")
    _watch(layer.ffn_hc, recorder.seen, "ffn_hc")
    streams, _ = layer(streams, rotations, cache, step)
    return streams, recorder.seen | {"streams": streams[0].astype(jnp.float32)}


def observe(model: DeepseekV4, tokens) -> list[LayerView]:
    """Run the main layers over one sequence, in one step and on the portable strategy, and keep what they did.

    Args:
      tokens: int [T]. Memory grows with T squared: this is for looking, at a few thousand tokens.
    Raises:
      ValueError: tokens are not one row that fits the cache, or the model is sharded.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < len(tokens) <= model.max_tokens:
        raise ValueError(f"observe: tokens must be one row of 1 to {model.max_tokens}, got shape {tokens.shape}")
    if model.parallel.mesh is not None:
        raise ValueError("observe: the model is sharded over a mesh; load it without one")
    ids, one = jnp.asarray(tokens, jnp.int32)[None], jnp.ones((1,), jnp.int32)
    step = Step(ids, 0 * one, len(tokens) * one)
    streams = jnp.repeat(model.embed(ids)[:, :, None], model.config.hc_mult, axis=2)
    views = []
    cache = model.init_cache(1, len(tokens))
    for layer, spec, state in zip(model.layers, model.config.layers, cache.layers, strict=True):
        streams, seen = _run_layer(layer, streams, model.rotations(spec.ratio, step), state, step)
        seen = jax.device_get(seen)
        mixing: dict[str, Any] = {name: Mixing(*seen.pop(name)) for name in ("attn_hc", "ffn_hc")}
        views.append(LayerView(spec, **seen, **mixing))
    return views


def recall(view: LayerView) -> np.ndarray:
    """[T]: share of the attention over all visible entries that the picked ones hold; NaN where there are none."""
    if view.mass is None or view.picked is None:
        raise ValueError("recall: a sliding layer has no entries to pick among; ask a CSA layer")
    with np.errstate(invalid="ignore"):
        return np.where(view.picked, view.mass, 0).sum(1) / view.mass.sum(1)


def best_recall(view: LayerView) -> np.ndarray:
    """[T]: what `recall` would be with as many entries, but those that the attention weighs most."""
    if view.mass is None or view.picked is None:
        raise ValueError("best_recall: a sliding layer has no entries to pick among; ask a CSA layer")
    running = np.cumsum(-np.sort(-view.mass, axis=1), axis=1)
    count = view.picked.sum(1)
    with np.errstate(invalid="ignore"):
        return np.take_along_axis(running, np.maximum(count - 1, 0)[:, None], axis=1)[:, 0] / running[:, -1]


def expert_loads(view: LayerView, experts: int) -> np.ndarray:
    """[experts]: share of all picks (token, choice) that each expert got."""
    return np.bincount(view.experts.reshape(-1), minlength=experts) / view.experts.size


def sinkhorn_residuals(hc: HyperConnection, mixing: Mixing, iterations: int) -> np.ndarray:
    """[iterations]: largest distance of a row sum of comb from 1, over all tokens, after 1, 2, ... iterations."""
    parts = jnp.asarray(mixing.mix), hc.base[...], hc.scale[...], hc.n
    combs = (split_mix(*parts, i, hc.eps)[2] for i in range(1, iterations + 1))
    return np.array([float(jnp.abs(comb.sum(-1) - 1).max()) for comb in combs])
