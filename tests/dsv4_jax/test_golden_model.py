"""Whole models against independent implementations: every case and flavour in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import FULL, GOLDEN, assert_logits_close, checkpoints_with, expected, load_model

import checkpoints
import dsv4_jax
from dsv4_jax.cache import Step
from dsv4_jax.layer import run_layer


@checkpoints_with("forward")
def test_logits(path):
    want = expected(path, "forward")
    assert_logits_close(dsv4_jax.logits(load_model(path), want["input_ids"]), want["logits"])


@checkpoints_with("greedy", quick=("tiny/fp8",))
def test_greedy_tokens(path):
    want = expected(path, "greedy")
    out = dsv4_jax.generate(load_model(path), want["prompt_ids"], max_new_tokens=want["tokens"].shape[1])
    np.testing.assert_array_equal(out.tokens, want["tokens"])
    assert out.lengths.tolist() == [want["tokens"].shape[1]]


@checkpoints_with("cached", few=("calm/fp8base", "tiny/fp8"))
def test_chunks_then_single_tokens(path):
    """The prompt in the stated chunks, then token by token: logits at every stated position."""
    want, model = expected(path, "cached"), load_model(path)
    ids, chunks = want["input_ids"], [int(c) for c in want["chunks"]]
    chunks += [1] * (ids.shape[1] - sum(chunks))
    widest = max(chunks)
    step = jax.jit(lambda model, tokens, cache, count: model(tokens, cache, count))
    cache, rows, start = model.init_cache(1, 1024), {}, 0
    for chunk in chunks:
        width = 1 if chunk == 1 else widest  # two programs; the count says how much of a chunk is real
        piece = np.zeros((1, width), np.int32)
        piece[:, :chunk] = ids[:, start : start + chunk]
        streams, cache = step(model, jnp.asarray(piece), cache, jnp.asarray([chunk]))
        for position in want["positions"]:
            if start <= position < start + chunk:
                rows[int(position)] = streams[:, position - start]
        start += chunk
    streams = jnp.stack([rows[int(p)] for p in want["positions"]], axis=1)
    assert_logits_close(model.head(streams), want["logits"])
    assert cache.length.tolist() == [ids.shape[1]]


@checkpoints_with("ragged", few=("calm/fp8base", "tiny/fp8"))
def test_ragged_batch_equals_single_runs(path):
    want, model = expected(path, "ragged"), load_model(path)
    lengths = want["lengths"]
    got = np.asarray(dsv4_jax.logits(model, want["ids_padded"], lengths))
    got = np.concatenate([row[:n] for row, n in zip(got, lengths, strict=True)])
    assert_logits_close(got, want["logits_concat"])
    out = dsv4_jax.generate(model, want["ids_padded"], lengths=lengths, max_new_tokens=want["tokens"].shape[1])
    np.testing.assert_array_equal(out.tokens, want["tokens"])


@checkpoints_with("mtp")
def test_mtp_block(path):
    """The MTP layer on given main streams: logits of every position and its own streams."""
    want, model = expected(path, "mtp"), load_model(path)
    ids = jnp.asarray(want["next_ids"], jnp.int32)
    start, count = jnp.zeros((1,), jnp.int32), jnp.asarray([ids.shape[1]], jnp.int32)

    @jax.jit
    def run(model, streams):
        out, _ = model.draft(0, streams, ids, model.init_mtp_cache(1)[0], start, count)
        return out, model.draft_head(0, out)

    streams, logits = run(model, jnp.asarray(want["streams"]))
    assert_logits_close(logits, want["logits"])
    np.testing.assert_allclose(streams[:, -16:], want["streams_out"], atol=2e-3)


@checkpoints_with("hidden")
def test_streams_after_every_layer(path):
    want, model = expected(path, "hidden"), load_model(path)
    ids = jnp.asarray(want["input_ids"], jnp.int32)
    cache = model.init_cache(1, 512)
    step = Step(ids, jnp.zeros((1,), jnp.int32), jnp.asarray([ids.shape[1]], jnp.int32))
    streams = jnp.repeat(model.embed(ids)[:, :, None], model.config.hc_mult, axis=2)
    for i, layer in enumerate(model.layers):
        np.testing.assert_allclose(streams[0], want["hidden"][i], atol=2e-3)
        rotations = model.rotations(model.config.compress_ratios[i], step)
        streams, _ = run_layer(layer, streams, rotations, cache.layers[i], step)
    np.testing.assert_allclose(streams[0], want["hidden"][-1], atol=2e-3)


@pytest.mark.parametrize("case", ["tiny/fp8", "calm/fp8base", "wide/bf16"] if FULL else ["calm/fp8base"])
def test_converted_checkpoint_gives_the_same(case, tmp_path):
    path = GOLDEN / case
    checkpoints.convert(path, tmp_path / "converted")
    model = checkpoints.load(tmp_path / "converted", max_tokens=1024, dtype=jnp.float32, numerics="exact")
    want = expected(path, "forward")
    assert_logits_close(dsv4_jax.logits(model, want["input_ids"]), want["logits"])
    greedy = expected(path, "greedy")
    out = dsv4_jax.generate(model, greedy["prompt_ids"], max_new_tokens=16)
    np.testing.assert_array_equal(out.tokens, greedy["tokens"][:, :16])


@pytest.mark.parametrize("flavour", ["fp8", "fp8base"] if FULL else ["fp8"])
def test_bfloat16_stays_in_its_profile(flavour):
    """The case without discrete choices, computed in bfloat16: noise, but no mistake (profile `bf16`)."""
    path = GOLDEN / "calm" / flavour
    want = expected(path, "forward")
    model = checkpoints.load(path, max_tokens=1024, dtype=jnp.bfloat16, numerics="exact")
    got = np.asarray(dsv4_jax.logits(model, want["input_ids"]), np.float64)
    error = np.abs(got - want["logits"])
    top = np.sort(want["logits"], -1)
    clear = top[..., -1] - top[..., -2] > 0.05
    agree = (got.argmax(-1) == want["logits"].argmax(-1))[clear].mean()
    assert error.max() <= 2 and error.mean() <= 0.15 and agree >= 0.97, (error.max(), error.mean(), agree)
