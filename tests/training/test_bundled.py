"""The bundled checkpoint: what training gave it must not get lost."""

import numpy as np
import pytest

import checkpoints
import dsv4_jax
from training import corpus


@pytest.fixture(scope="module")
def bundled():
    path = checkpoints.bundled_path()
    return checkpoints.load(path, max_tokens=256), checkpoints.load_tokenizer(path)


HELD_OUT = (  # how the five blocks that training never saw begin
    "And Moses spake unto Aaron, and unto Eleazar and unto Ithamar, his sons",
    "And lo Zadok also, and all the Levites were with him, bearing the ark",
    "Better is a dry morsel, and quietness therewith, than an house full of",
    "And it shall come to pass afterward, that I will pour out my spirit",
    "Would to God ye could bear with me a little in my folly: and indeed",
)


@pytest.mark.slow
def test_bundled_speaks_and_its_drafts_are_mostly_right(bundled):
    model, tokenizer = bundled
    ids = [[corpus.BOS, *tokenizer.encode(text, add_special_tokens=False).ids] for text in HELD_OUT]
    lengths = [len(row) for row in ids]
    prompts = np.asarray([row + [0] * (max(lengths) - len(row)) for row in ids])
    run = lambda: dsv4_jax.generate(model, prompts, lengths=lengths, max_new_tokens=48, drafts=1)
    first, again = run(), run()
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.stats.acceptance[0] > 0.5
    words = {word for row in first.tokens for word in tokenizer.decode(row.tolist()).split()}
    assert len(words & {"the", "and", "of", "And", "that", "unto", "he", "in", "to", "his", "LORD", "shall"}) >= 6, (
        words
    )


def test_bundled_tokenizer_has_the_official_marks(bundled):
    _, tokenizer = bundled
    for mark in corpus.SPECIAL:
        assert tokenizer.encode(mark, add_special_tokens=False).ids == [tokenizer.token_to_id(mark)]
