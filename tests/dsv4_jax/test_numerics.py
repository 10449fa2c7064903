"""Official numerics against the golden data that emulates them, and 8-bit caches."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN, ROUNDED, assert_logits_close, case_name, expected, load_model, mean_kl

import checkpoints
import dsv4_jax
from dsv4_jax.numerics import resolve_numerics

pytestmark = pytest.mark.slow

CALM, TINY = GOLDEN / "calm" / "fp8", GOLDEN / "tiny" / "fp8"
# KL(exact || rounded) that the references have, in float32, on the first row of `forward`.
REFERENCE_KL = {"tiny/fp8": 0.52, "yarn/fp8": 0.08, "wide/fp8": 0.12, "calm/fp8": 0.04}


def test_logits_with_every_entry_picked():
    want = expected(CALM, "rounded")
    got = dsv4_jax.logits(load_model(CALM, numerics="official"), want["all.input_ids"])
    assert_logits_close(got, want["logits_all"], ROUNDED, top1=0.98)
    assert np.abs(np.asarray(got) - want["logits_all"]).mean() < 1e-4  # no rounding decision differs here


def test_logits_where_the_indexers_rounding_decides(tmp_path):
    want = expected(CALM, "rounded")
    path = shutil.copytree(CALM, tmp_path / "topk6")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"index_topk": int(want["topk6.index_topk"])}))
    got = dsv4_jax.logits(load_model(path, numerics="official"), want["topk6.input_ids"])
    assert_logits_close(got, want["logits_topk6"], ROUNDED, top1=0.98)


@pytest.mark.parametrize("path", [CALM, TINY, GOLDEN / "yarn" / "fp8"], ids=case_name)
def test_rounding_moves_the_logits_as_far_as_it_moves_the_references(path):
    want = expected(path, "forward")
    ids = want["input_ids"][:1]
    kl = mean_kl(dsv4_jax.logits(load_model(path, numerics="official"), ids), want["logits"][:1])
    assert 0.2 * REFERENCE_KL[case_name(path)] < kl < 1.5 * REFERENCE_KL[case_name(path)], kl


def test_auto_is_official_where_the_checkpoint_is_quantised():
    quantised, wide = load_model(CALM).config, load_model(GOLDEN / "tiny" / "bf16").config
    assert resolve_numerics("auto", quantised).name == "official" and resolve_numerics("auto", wide).name == "exact"


def test_an_8_bit_cache_loses_nothing_with_official_numerics():
    """In bfloat16, where the rotary channels are bfloat16 anyway: every logit equal, in prefill and in decoding."""
    options = {"dtype": jnp.bfloat16, "numerics": "official", "max_tokens": 128}
    wide = checkpoints.load(CALM, **options)
    narrow = checkpoints.load(CALM, **options, cache_dtype="fp8")
    ids = expected(CALM, "forward")["input_ids"][:1, :64]
    np.testing.assert_array_equal(dsv4_jax.logits(narrow, ids), dsv4_jax.logits(wide, ids))
    tokens = [dsv4_jax.generate(m, ids[:, :30], max_new_tokens=40).tokens for m in (narrow, wide)]
    np.testing.assert_array_equal(*tokens)


def test_an_8_bit_cache_with_exact_numerics_costs_as_much_as_rounding_kv_rows():
    ids = expected(CALM, "forward")["input_ids"][:1]
    narrow = dsv4_jax.logits(load_model(CALM, cache_dtype="fp8"), ids)
    kl = mean_kl(narrow, expected(CALM, "forward")["logits"][:1])
    assert 1e-6 < kl < REFERENCE_KL["calm/fp8"]


def test_cache_leaves_are_of_the_stated_formats():
    official = load_model(TINY, numerics="official", cache_dtype="fp8").init_cache(1, 64).layers[2]
    exact = load_model(TINY, numerics="exact", cache_dtype="fp8").init_cache(1, 64).layers[2]
    keys = official.indexer.entries
    assert official.window.codes.dtype == jnp.float8_e4m3fn
    assert keys.data.dtype == jnp.uint8 and keys.data.shape[-1] == keys.dim // 2 + keys.dim // 32
    assert exact.indexer.entries.data.dtype == jnp.float8_e4m3fn and exact.indexer.entries.scale.dtype == jnp.float32
