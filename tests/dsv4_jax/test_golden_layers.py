"""Intermediate values inside one layer of each kind, against the captures (2e-3 absolute; selections exactly)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN, expected, load_model

from dsv4_jax.cache import Step
from dsv4_jax.kernels import XlaKernels, grouped_output
from dsv4_jax.layer import run_layer
from dsv4_jax.rope import apply_rope
from pallas_kernels.index_topk import index_scores
from pallas_kernels.sparse_mla import Indices, Mask

CASES = [("tiny/bf16", 0), ("tiny/bf16", 2), ("tiny/bf16", 3), ("wide/bf16", 1), ("wide/bf16", 2)]
ATOL = 2e-3


class Recorder(XlaKernels):
    """The portable strategy, keeping what passes through it."""

    def __init__(self):
        object.__setattr__(self, "seen", {})

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other

    def sparse_mla(self, q, positions, window, entries, picks, sinks, *, scale):
        out = super().sparse_mla(q, positions, window, entries, picks, sinks, scale=scale)
        self.seen |= {"q": q, "kv": window.rows, "entries": entries, "picks": picks, "attended": out}
        return out

    def output_projection(self, o, rotation, o_a, o_b, groups, numerics):
        back = jax.tree.map(lambda table: table[:, :, None], rotation)
        self.seen |= {"context": apply_rope(o, back, inverse=True), "o_lora": grouped_output(o, rotation, o_a, groups)}
        return super().output_projection(o, rotation, o_a, o_b, groups, numerics)

    def pick_entries(self, q, weights, keys, visible, *, top_k):
        self.seen |= {"index_q": q, "index_k": keys, "scores": index_scores(q, weights, keys)}
        return super().pick_entries(q, weights, keys, visible, top_k=top_k)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "index"), CASES, ids=lambda v: str(v))
def test_layer(case, index):
    path = GOLDEN / case
    model, want = load_model(path), expected(path, "layers")
    ids = jnp.asarray(want["input_ids"] if "input_ids" in want.files else expected(path, "forward")["input_ids"][:1])
    ids = ids.reshape(1, -1).astype(jnp.int32)
    get = lambda name: want[f"L{index}.{name}"]
    rows = want["rows"] if "rows" in want.files else get("rows")
    layer, recorder = model.layers[index], Recorder()
    streams, step, cache, rotations = streams_before(model, index, ids)

    def close(name, got):
        np.testing.assert_allclose(np.asarray(got), get(name), atol=ATOL, rtol=0, err_msg=name)

    x, (post, comb) = layer.attn_hc.collapse(streams)
    close("hc_attn_post", post[0, rows])
    close("hc_attn_comb", comb[0, rows])
    close("hc_attn_collapsed", x[0, rows])
    normed = layer.input_layernorm(x)
    close("attn_in", normed[0, rows])
    out, after = with_kernels(layer, recorder)(normed, rotations, cache, step)
    seen = recorder.seen
    close("q", seen["q"][0, rows])
    close("kv", seen["kv"][0, -ids.shape[1] :][rows])
    close("context", seen["context"][0, rows])
    close("o_lora", seen["o_lora"][0, rows].reshape(len(rows), -1))
    close("attn_out", out[0, rows])
    if after.compressor is not None:
        entries = get("compressed_kv")
        close("compressed_kv", after.compressor.entries[0, : len(entries)])
    if after.indexer is not None:
        check_selection(seen, get, rows, close, ids.shape[1])
    streams = layer.attn_hc.expand(out, streams, (post, comb))
    x, _ = layer.ffn_hc.collapse(streams)
    normed = layer.post_attention_layernorm(x)
    close("ffn_in", normed[0, rows])
    check_moe(layer.mlp, normed, step, get, rows, close)


def streams_before(model, index, ids):
    """The streams that enter layer `index`, the step, that layer's empty cache and its rotations."""
    step = Step(ids, jnp.zeros((1,), jnp.int32), jnp.asarray([ids.shape[1]], jnp.int32))
    cache = model.init_cache(1, 512)
    streams = jnp.repeat(model.embed(ids)[:, :, None], model.config.hc_mult, axis=2)
    rotations = [model.rotations(ratio, step) for ratio in model.config.compress_ratios]
    for i in range(index):
        streams, _ = run_layer(model.layers[i], streams, rotations[i], cache.layers[i], step)
    return streams, step, cache.layers[index], rotations[index]


def with_kernels(layer, kernels):
    """The layer's attention with another strategy."""
    attention = jax.tree.unflatten(*reversed(jax.tree.flatten(layer.self_attn)))
    attention.kernels = kernels
    if hasattr(attention, "indexer"):
        attention.indexer.kernels = kernels
    return attention


def check_selection(seen, get, rows, close, T):
    close("index_q", seen["index_q"][0, rows])
    keys = get("index_k")
    close("index_k", seen["index_k"][0, : len(keys)])
    want, scores = get("index_score"), np.asarray(seen["scores"][0, rows, : len(keys)])
    stored = np.isfinite(want)
    assert stored.any()
    np.testing.assert_allclose(scores[stored], want[stored], atol=ATOL)
    picks, selected = seen["picks"], get("index_selected")
    if isinstance(picks, Mask):
        got = np.asarray(picks.mask)[0, :, : selected.shape[1]]
    else:
        assert isinstance(picks, Indices)
        index = np.asarray(picks.index)[0]
        got = np.zeros((T, selected.shape[1] + 1), bool)
        np.put_along_axis(got, index, True, axis=1)
        got = got[:, :-1]
    np.testing.assert_array_equal(got, selected)


def check_moe(moe, normed, step, get, rows, close):
    x = normed[0]
    index, weights = moe.gate(x, step.tokens[0])
    order = np.argsort(np.asarray(index)[rows], axis=1)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(index)[rows], order, 1), get("router_indices"))
    close("router_weights", np.take_along_axis(np.asarray(weights)[rows], order, 1))
    close("routed_out", moe.experts(x, index, weights, step.real[0])[np.asarray(rows)])
    close("moe_out", moe(normed, step)[0, np.asarray(rows)])
