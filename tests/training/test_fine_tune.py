"""Opening a checkpoint, teaching it, closing it again."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoints
from checkpoints.synth import with_layers
from dsv4_jax.presets import PRESETS
from dsv4_jax.quantized import QuantizedArray, dequantize
from training import fine_tune

LENGTH = 128  # a multiple of the window


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three layers, one of each kind, an MTP layer, fp8 and fp4 weights, with the bundled tokenizer."""
    path = tmp_path_factory.mktemp("tune") / "small"
    checkpoints.synth(with_layers(PRESETS["tiny"], 3) | {"vocab_size": 768, "num_hash_layers": 1}, path, seed=3)
    shutil.copyfile(checkpoints.bundled_path() / "tokenizer.json", path / "tokenizer.json")
    return path


def values(path):
    """Every parameter and buffer of a checkpoint, expanded."""
    model = checkpoints.load(path, max_tokens=LENGTH, dtype=jnp.float32)
    is_quantized = lambda leaf: isinstance(leaf, QuantizedArray)
    wide = lambda leaf: dequantize(leaf, jnp.float32) if is_quantized(leaf) else leaf
    return jax.tree.leaves(jax.tree.map(wide, nnx.state(model), is_leaf=is_quantized))


@pytest.mark.slow
def test_a_checkpoint_that_learnt_nothing_comes_back_the_same(small, tmp_path):
    again = fine_tune.export(fine_tune.wide_model(small, LENGTH), like=small, out=tmp_path / "again")
    assert checkpoints.load_tokenizer(again).get_vocab_size() == 768
    for got, want in zip(values(again), values(small), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_loss_falls_on_verses_it_has_not_seen(small):
    tokenizer = checkpoints.load_tokenizer(small)
    learnt, unseen = (fine_tune.encode(tokenizer, fine_tune.rhymes(count, seed)) for count, seed in ((60, 0), (30, 1)))
    model = fine_tune.wide_model(small, LENGTH)
    before = fine_tune.held_out_loss(model, unseen, LENGTH, rows=2)
    curve = list(fine_tune.fine_tune(model, learnt, fine_tune.short_phase(25, rows=2, length=LENGTH)))
    assert len(curve) == 25 and curve[-1] < curve[0]
    assert fine_tune.held_out_loss(model, unseen, LENGTH, rows=2) < before - 0.5
    with pytest.raises(ValueError, match="8 rows of 4096 need"):
        fine_tune.held_out_loss(model, unseen, 4096, rows=8)


def test_rhymes_are_sentences_and_follow_their_seed():
    text = fine_tune.rhymes(50, seed=0)
    assert text == fine_tune.rhymes(50, seed=0) != fine_tune.rhymes(50, seed=1)
    verses = text.splitlines()
    assert len(verses) == 50 and len(set(verses)) > 40
    assert all(verse.startswith("This is the ") and verse.endswith("the house that Jack built.") for verse in verses)
