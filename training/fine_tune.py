"""Fine-tuning: a checkpoint opened up to float32, taught another text, and closed again in its own formats."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

import checkpoints
from checkpoints.names import leaf_path
from checkpoints.save import save
from dsv4_jax.linear import Buffer
from dsv4_jax.model import DeepseekV4
from dsv4_jax.numerics import ExactNumerics
from dsv4_jax.quantized import QuantizedArray, dequantize
from training import corpus, optimizer
from training.demo import Phase, batches, build, losses, make_step, schedule, stored_arrays

# "The house that Jack built", the nursery rhyme: who, and what they do to whoever comes next.
LINKS = (
    ("malt", "lay in"), ("rat", "ate"), ("cat", "killed"), ("dog", "worried"), ("cow", "tossed"),
    ("maiden", "milked"), ("man", "kissed"), ("priest", "married"), ("cock", "waked"), ("farmer", "kept"),
)  # fmt: skip


def rhymes(count: int, seed: int) -> str:
    """So many verses of the rhyme, a line each, whose people and animals come in any order."""
    draw = random.Random(seed)
    verses = []
    for _ in range(count):
        chain = draw.sample(LINKS, draw.randint(1, 5))
        verses.append("This is" + "".join(f" the {who} that {does}" for who, does in chain) + " the house")
    return "".join(f"{verse} that Jack built.\n" for verse in verses)


def wide_model(path: Path, max_tokens: int) -> DeepseekV4:
    """A checkpoint as a model to train: every weight expanded to float32, nothing rounded."""
    held = checkpoints.load(path, max_tokens=max_tokens, dtype=jnp.float32, kernels="xla")
    config = json.loads((path / "config.json").read_text())
    wide = jax.eval_shape(lambda: build(config, max_tokens, ExactNumerics()))
    wide.rope_main.fill()
    wide.rope_compress.fill()
    is_quantized = lambda leaf: isinstance(leaf, QuantizedArray)
    expand = lambda w: dequantize(w, jnp.float32)
    nnx.update(wide, jax.tree.map(expand, nnx.state(held, nnx.Param), is_leaf=is_quantized), nnx.state(held, Buffer))
    return wide


def fine_tune(model: DeepseekV4, ids: np.ndarray, phase: Phase, seed: int = 0) -> Iterator[float]:
    """Teach `model` (from `wide_model`) the tokens `ids`; yields the loss of each step, before it.

    The model itself changes, step by step.
    """
    parts: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = parts
    labels = jax.tree_util.tree_map_with_path(lambda keys, w: optimizer.label(leaf_path(keys), w), params)
    transformation = optimizer.make(schedule(phase), labels)
    # On a device by name, as they come back from a step: anything else would compile that twice.
    params, state = jax.device_put((params, transformation.init(params)), jax.local_devices()[0])
    update = make_step({}, phase, transformation, graph, rest)
    rows = batches(ids, phase.rows, phase.length, seed)
    for _ in range(phase.steps):
        params, state, found = update(params, state, next(rows))
        nnx.update(model, params)
        yield float(found["loss"])


def held_out_loss(model: DeepseekV4, ids: np.ndarray, length: int, rows: int = 4) -> float:
    """Mean loss in nats a token on the first `rows` rows of text that was not learnt."""
    need = rows * (length + 1)
    if len(ids) < need:
        raise ValueError(f"held_out_loss: {len(ids)} tokens; {rows} rows of {length} need {need}")
    cut = ids[:need].reshape(rows, length + 1)
    tokens = np.concatenate([np.full((rows, 1), corpus.BOS), cut], axis=1).astype(np.int32)
    phase = Phase("score", 1, rows, length, (0.0, 0.0))
    parts: Any = nnx.split(model)
    return float(_score(parts[0], phase, parts[1], tokens))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(graph, phase: Phase, state, tokens) -> jax.Array:
    return losses(nnx.merge(graph, state), tokens, phase)[0]


def export(model: DeepseekV4, like: Path, out: Path) -> Path:
    """`model` in the formats, and with the tokenizer, of the checkpoint `like`; replaces `out`."""
    config = json.loads((like / "config.json").read_text())
    parts: Any = nnx.split(model, nnx.Param, ...)
    save(stored_arrays(config, *parts[1:]), config, out, force=True)
    for file in like.glob("tokenizer*.json"):
        shutil.copyfile(file, out / file.name)
    return out


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """int32 [tokens] of a whole text."""
    return corpus.encode(tokenizer, [text])[0]


def short_phase(steps: int, rows: int = 4, length: int = 256) -> Phase:
    """A fine-tuning run: the indexer and the MTP layer are left as they are."""
    return Phase("fine-tune", steps, rows, length, (2e-3, 2e-4))
