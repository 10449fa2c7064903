"""The demo checkpoint on text it has not seen: against a 5-gram model, its drafts, its indexer, a needle, its words.

Everything is the bundled checkpoint as it is shipped, with official numerics, unless a line says otherwise.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import checkpoints
import dsv4_jax
from dsv4_jax.generate import Stats
from dsv4_jax.linear import Buffer
from dsv4_jax.model import DeepseekV4
from dsv4_jax.numerics import ExactNumerics
from dsv4_jax.quantized import QuantizedArray, dequantize
from dsv4_jax.sharding import leaf_path
from training import corpus, dense
from training.ngram import KneserNey

ROW, LONG = 512, 4096
PARTS = ("perplexity", "quantisation", "indexer", "agreement", "speed", "needle", "text")
PROMPTS = ("In the beginning God", "And the king said unto", "Blessed are they that")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=checkpoints.bundled_path(), help="default: the bundled checkpoint"
    )
    parser.add_argument(
        "--unquantised", type=Path, help="params.npz of the training run, to measure what rounding costs"
    )
    parser.add_argument("--rows", type=int, default=24, help=f"held-out rows of {ROW} tokens to score")
    parser.add_argument("--kernels", default="auto", help="platform strategy of the model")
    parser.add_argument("--only", choices=PARTS, help="measure this alone")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate for each draft count")


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = checkpoints.load(args.model, max_tokens=8192, kernels=args.kernels)
    tokenizer = checkpoints.load_tokenizer(args.model)
    if tokenizer is None:
        raise ValueError(f"{args.model}: has no tokenizer.json, so there is no text to score")
    training, held_out = corpus.split_text(corpus.read_text())
    seen, unseen = corpus.encode(tokenizer, training), corpus.encode(tokenizer, held_out)
    rows = held_out_rows(unseen, ROW)[: args.rows]
    exact = functools.cache(partial(exact_model, args.model, model))
    measures: dict[str, Callable[[], Any]] = {
        "perplexity": lambda: perplexities(model, tokenizer, rows, seen),
        "quantisation": lambda: quantisation(args, model, rows),
        "indexer": lambda: indexer_recall(exact(), held_out_rows(unseen, LONG)),
        "agreement": lambda: agreement(exact(), rows),
        "speed": lambda: speed(model, held_out_rows(unseen, 128)[:8], args.new),
        "needle": lambda: needle(model, tokenizer, unseen),
        "text": lambda: {prompt: continuation(model, tokenizer, prompt) for prompt in PROMPTS},
    }
    return {part: measures[part]() for part in ([args.only] if args.only else PARTS)}


def held_out_rows(texts: list[np.ndarray], length: int) -> np.ndarray:
    """int32 [rows, length]: a beginning mark and length - 1 tokens, from all texts in turn."""
    pieces = [text[i : i + length - 1] for text in texts for i in range(0, len(text) - length + 2, length - 1)]
    order = np.random.default_rng(0).permutation(len(pieces))
    return np.stack([np.concatenate([[corpus.BOS], pieces[i]]) for i in order]).astype(np.int32)


def token_losses(model: DeepseekV4, rows: np.ndarray) -> np.ndarray:
    """-log p of every token but the first, in nats: [rows, length - 1]."""
    out = []
    for row in rows:
        logits = dsv4_jax.logits(model, row[None])[0, :-1]
        out.append(-np.asarray(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(row)[1:, None], 1))[:, 0])
    return np.stack(out)


def perplexities(model: DeepseekV4, tokenizer, rows: np.ndarray, seen: list[np.ndarray]) -> dict[str, Any]:
    """The model and the 5-gram model on the same tokens, each with what precedes a token in its row."""
    characters = sum(len(tokenizer.decode(row[1:].tolist())) for row in rows)
    gram = KneserNey(seen, model.config.vocab_size)
    losses = {"model": token_losses(model, rows), "5-gram": np.stack([gram.loss(row[1:]) for row in rows])}
    return {name: figures(loss, characters) for name, loss in losses.items()} | {"tokens": int(rows[:, 1:].size)}


def figures(loss: np.ndarray, characters: int) -> dict[str, float]:
    return {
        "per_token": float(np.exp(loss.mean())),
        "per_character": float(np.exp(loss.sum() / characters)),
        "bits_per_character": float(loss.sum() / characters / np.log(2)),
    }


def quantisation(args: argparse.Namespace, model: DeepseekV4, rows: np.ndarray) -> dict[str, float]:
    """Perplexity of the shipped weights, with activations rounded and not, and of the weights before rounding."""
    exact = checkpoints.load(args.model, max_tokens=ROW, numerics="exact")
    found = {name: float(np.exp(token_losses(m, rows).mean())) for name, m in (("official", model), ("exact", exact))}
    if args.unquantised:
        wide = exact_model(args.model, model, args.unquantised)
        loss = [-jnp.take_along_axis(main_log_probs(wide, row[None])[:, :-1], row[None, 1:, None], -1) for row in rows]
        found["unquantised"] = float(np.exp(np.mean(loss)))
    reference = found.get("unquantised", found["exact"])
    return found | {"loss_percent": 100 * (found["official"] / reference - 1)}


def exact_model(path: Path, model: DeepseekV4, weights: Path | None = None) -> DeepseekV4:
    """The same model for `training.dense`: weights expanded to float32, or those of a training run's params.npz.

    Activations are rounded as by official numerics where the weights are the shipped ones.
    """
    from training.demo import StraightThrough, build  # optax is in the extra `train`

    is_quantized = lambda x: isinstance(x, QuantizedArray)
    numerics = ExactNumerics() if weights else StraightThrough()
    wide = build(json.loads((path / "config.json").read_text()), 8192, numerics)
    expand = lambda x: dequantize(x, jnp.float32)
    held = jax.tree.map(expand, nnx.state(model, nnx.Param), is_leaf=is_quantized)
    nnx.update(wide, held, nnx.state(model, Buffer))
    if weights:
        with np.load(weights) as file:
            read = lambda keys, w: jnp.asarray(file[leaf_path(keys)])
            nnx.update(wide, jax.tree_util.tree_map_with_path(read, nnx.state(wide, nnx.Param)))
    return wide


def _jit(function):
    """Compile a function of a model and arrays; the model's weights are arguments."""

    @partial(jax.jit, static_argnums=0)
    def compiled(graph, state, *arrays):
        return function(nnx.merge(graph, state), *arrays)

    return lambda model, *arrays: compiled(*nnx.split(model), *arrays)


@_jit
def main_log_probs(model: DeepseekV4, rows):
    streams, _ = dense.forward(model, rows)
    return jax.nn.log_softmax(dense.logits(model.hc_head, model.norm, model.lm_head, streams))


@_jit
def _recalls(model: DeepseekV4, rows):
    _, trace = dense.forward(model, rows)
    return jnp.stack(trace.recalls)


def indexer_recall(model: DeepseekV4, rows: np.ndarray) -> dict[str, Any]:
    """Share of the attention over entries that the picked ones hold, at the last 256 of 4,096 tokens.

    The attention is that of all heads over every visible entry; as many entries picked at random hold picks / entries.
    """
    picks, entries = model.config.index_topk, LONG // 4
    found = np.stack([np.asarray(_recalls(model, row[None]))[:, 0, -256:].mean(-1) for row in rows[:6]])
    by_layer = found.mean(0)
    return {
        "entries": entries,
        "picks": picks,
        "random": picks / entries,
        "recall": float(by_layer.mean()),
        "by_layer": by_layer.tolist(),
        "over_random": float(by_layer.mean() / (picks / entries)),
    }


@_jit
def _agreements(model: DeepseekV4, rows):
    streams, _ = dense.forward(model, rows)
    drafted, _ = dense.draft(model, streams, jnp.roll(rows, -1, axis=1))  # the last token's own draft is not compared
    main = dense.logits(model.hc_head, model.norm, model.lm_head, streams).argmax(-1)
    guess = dense.logits(model.mtp[0].hc_head, model.mtp[0].norm, model.lm_head, drafted).argmax(-1)
    return guess[:, :-1] == main[:, 1:]


def agreement(model: DeepseekV4, rows: np.ndarray) -> float:
    """How often, reading held-out text, the first draft is what the main model would say next."""
    return float(np.mean([np.asarray(_agreements(model, row[None])).mean() for row in rows[:16]]))


def speed(model: DeepseekV4, prompts: np.ndarray, new: int) -> dict[str, Any]:
    """Greedy text after held-out prompts, one at a time: tokens/s with 0 .. 4 drafts, compiled beforehand."""
    generate = partial(dsv4_jax.generate, model, max_new_tokens=new)
    counts, runs = range(5), {drafts: [] for drafts in range(5)}
    for drafts in counts:
        generate(prompts[0], drafts=drafts)
    for prompt in prompts:  # each count in turn, so that a machine that slows down slows all of them
        for drafts in counts:
            runs[drafts].append(generate(prompt, drafts=drafts).stats)
    found = {str(drafts): rate_of(runs[drafts]) for drafts in counts}
    plain = found["0"]["tokens_per_second"]
    for figures in found.values():
        figures["speedup"] = figures["tokens_per_second"] / plain
    return found


def rate_of(runs: list[Stats]) -> dict[str, Any]:
    """Tokens/s over all runs, and how often the drafts of each position were right."""
    accepted = np.sum([run.accepted for run in runs], axis=0)
    checked = sum(run.drafted for run in runs) // max(1, accepted.size)
    return {
        "tokens_per_second": sum(run.new_tokens for run in runs) / sum(run.seconds for run in runs),
        "acceptance": (accepted / max(1, checked)).tolist(),
    }


NEEDLE, QUESTION = "And the name of the stranger was {name}.\n", "And the name of the stranger was"
NAMES = ("Moses", "David", "Abraham", "Joseph", "Samuel", "Solomon", "Daniel", "Aaron", "Joshua", "Jonathan")


def needle(model: DeepseekV4, tokenizer, texts: list[np.ndarray]) -> dict[str, Any]:
    """A name put at each tenth of 4,000 tokens; is it the likeliest of ten when the question comes?

    Chance is 0.1. Each depth is asked for every name.
    """
    text = held_out_rows(texts, 4001)[0, 1:]
    ids = lambda s: tokenizer.encode(s, add_special_tokens=False).ids
    question, endings = ids(QUESTION), [ids(f" {name}")[0] for name in NAMES]
    room = 4000 - len(question) - max(len(ids(NEEDLE.format(name=n))) for n in NAMES) - 1
    hits = []
    for tenth in range(10):
        cut, right = room * tenth // 10, 0
        for i, name in enumerate(NAMES):
            row = [corpus.BOS, *text[:cut], *ids("\n" + NEEDLE.format(name=name)), *text[cut:room], *question]
            logits = np.asarray(dsv4_jax.logits(model, np.asarray(row, np.int32)))[0, -1]
            right += int(np.argmax(logits[endings]) == i)
        hits.append(right / len(NAMES))
    return {"by_depth": hits, "mean": float(np.mean(hits)), "chance": 1 / len(NAMES)}


def continuation(model: DeepseekV4, tokenizer, prompt: str, new: int = 60) -> str:
    ids = [corpus.BOS, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    out = dsv4_jax.generate(model, np.asarray(ids, np.int32), max_new_tokens=new, drafts=1)
    return prompt + tokenizer.decode(out.tokens[0, : out.lengths[0]].tolist())


def show(result: dict[str, Any], console: Console) -> None:
    for part, found in result.items():
        SHOWN[part](found, console)


def show_perplexity(found: dict[str, Any], console: Console) -> None:
    table = Table("held-out text", "perplexity per token", "per character", "bits per character")
    for name in ("model", "5-gram"):
        table.add_row(name, *(f"{value:.4g}" for value in found[name].values()))
    console.print(table)


def show_quantisation(found: dict[str, float], console: Console) -> None:
    known = ", ".join(f"{name} {found[name]:.3f}" for name in ("official", "exact", "unquantised") if name in found)
    console.print(f"perplexity by numerics: {known}; rounding costs {found['loss_percent']:.2f} %")


def show_indexer(found: dict[str, Any], console: Console) -> None:
    console.print(
        f"indexer: {found['picks']} of {found['entries']} entries hold {found['recall']:.3f} of the attention, "
        f"{found['over_random']:.1f} times what random ones would"
    )


def show_agreement(found: float, console: Console) -> None:
    console.print(f"first draft equals the model's own choice on held-out text: {found:.3f}")


def show_speed(found: dict[str, Any], console: Console) -> None:
    table = Table("drafts", "tokens/s", "speed-up", "acceptance by position")
    for drafts, s in found.items():
        shares = " ".join(f"{x:.2f}" for x in s["acceptance"])
        table.add_row(drafts, f"{s['tokens_per_second']:.1f}", f"{s['speedup']:.2f}", shares)
    console.print(table)


def show_needle(found: dict[str, Any], console: Console) -> None:
    depths = " ".join(f"{x:.1f}" for x in found["by_depth"])
    mean = f"mean {found['mean']:.2f}, chance {found['chance']}"
    console.print(f"needle at each tenth of 4,000 tokens: {depths} ({mean})")


def show_text(found: dict[str, str], console: Console) -> None:
    for text in found.values():
        console.print(text, markup=False, highlight=False)
        console.print()


SHOWN: dict[str, Callable[[Any, Console], None]] = {
    "perplexity": show_perplexity,
    "quantisation": show_quantisation,
    "indexer": show_indexer,
    "agreement": show_agreement,
    "speed": show_speed,
    "needle": show_needle,
    "text": show_text,
}
