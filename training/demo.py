"""Train the demo checkpoint: `python -m training.demo --out DIR`.

Our own model, differentiated end to end: next-token loss, the MTP layer's loss beside it, a router bias that follows
the load, an indexer aligned with the attention it serves. Later phases read longer rows, through the indexer, and round
weights and activations as the released formats do (straight through), so that quantising loses next to nothing. The
last phase trains the MTP layer alone, on the finished model's own distribution.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from checkpoints.names import abstract_model, model_leaves
from checkpoints.save import save
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import DeepseekV4
from dsv4_jax.numerics import ExactNumerics, Numerics
from dsv4_jax.presets import PRESETS
from dsv4_jax.quantized import QuantizedArray, dequantize, quantize_fp4, quantize_fp8
from dsv4_jax.random_weights import random_weights
from dsv4_jax.sharding import leaf_path
from pallas_kernels.formats import decode_e8m0, fp4_scale, fp8_scale, hadamard, round_e2m1, round_e4m3
from training import corpus, dense, optimizer

CONFIG: dict[str, Any] = PRESETS["tiny"] | {
    "vocab_size": 768, "hidden_size": 256, "num_hash_layers": 2, "index_n_heads": 4, "index_topk": 64,
    "max_position_embeddings": 8192,
    "rope_scaling": PRESETS["tiny"]["rope_scaling"] | {"factor": 4, "original_max_position_embeddings": 2048},
}  # fmt: skip
MTP_WEIGHT, INDEX_WEIGHT, BIAS_STEP = 0.3, 0.3, 2e-3


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one compiled step."""

    name: str
    steps: int
    rows: int
    length: int
    rate: tuple[float, float]  # learning rate at its start, after a short warm-up, and at its end
    index: str = "off"  # see `dense.forward`
    drafts: bool = False  # the MTP layer learns too
    rounding: bool = False
    alone: bool = False  # only the MTP layer learns


PHASES = (  # about an hour on one core
    Phase("learn", 2000, 4, 512, (1e-2, 6e-3)),
    Phase("round", 400, 4, 512, (6e-3, 1e-3), "align", drafts=True, rounding=True),
    Phase("draft", 120, 4, 512, (3e-3, 3e-4), drafts=True, rounding=True, alone=True),
)


class StraightThrough(Numerics):
    """Official rounding whose gradient is that of the identity."""

    name, index_format = "straight-through", "fp4"

    def activations(self, x, w):
        return through(x, rounded(x, 128))

    def kv(self, rows, rope_dim):
        still, turning = rows[..., :-rope_dim], rows[..., -rope_dim:]
        return jnp.concatenate([through(still, rounded(still, 64)), turning], axis=-1)

    def index(self, x):
        turned = x @ hadamard(jnp.eye(x.shape[-1]))  # symmetric; as a product, XLA compiles it in no time
        return through(turned, rounded(turned, 32, fp4_scale, round_e2m1))


def through(x, rounded):
    """`rounded`, with x's gradient; the barrier keeps the rounding from being fused, again and again, into its uses."""
    return x + jax.lax.optimization_barrier(jax.lax.stop_gradient(rounded - x))


def rounded(x: jax.Array, group: int, scale_of=fp8_scale, nearest=round_e4m3) -> jax.Array:
    """`round_rows` (or fp4), with barriers that keep XLA from taking a group's maximum once per element."""
    groups = x.reshape(*x.shape[:-1], -1, min(group, x.shape[-1]))
    scale = scale_of(jax.lax.optimization_barrier(jnp.abs(groups).max(-1, keepdims=True)))
    return (nearest(groups * decode_e8m0(254 - scale)) * decode_e8m0(scale)).reshape(x.shape)


def build(config: dict[str, Any], tokens: int, numerics: Numerics) -> DeepseekV4:
    """The model to train: every weight in float32."""
    wide = ModelConfig.from_dict(config | {"quantization_config": None, "expert_dtype": None})
    return DeepseekV4(wide, max_tokens=tokens, dtype=jnp.float32, kernels="xla", numerics=numerics)


def initialise(config: dict[str, Any], seed: int) -> DeepseekV4:
    """Random weights; hyper-connections start near "read the mean, write to all, keep each stream"."""
    model = random_weights(lambda: build(config, 128, ExactNumerics()), seed=seed)
    n, rng = config["hc_mult"], np.random.default_rng(seed)

    def one(keys, w):
        path = leaf_path(keys)
        if path.endswith("norm.weight"):
            return jnp.ones_like(w)
        if path.endswith(("sinks", "bias", "head.base")):
            return jnp.zeros_like(w)
        if path.endswith("hc.base"):
            base = np.concatenate([np.full(n, -1.1), np.zeros(n), 4 * np.eye(n).reshape(-1)])
            return jnp.asarray(base + 0.3 * rng.standard_normal(base.shape), jnp.float32)
        if path.endswith(".scale"):
            return jnp.full_like(w, 0.1)
        gain = (
            8.0
            if path.endswith("embed_tokens")
            else 0.3
            if path.endswith(("o_b_proj", "down_proj", "lm_head"))
            else 1.0
        )
        return w * gain

    nnx.update(model, jax.tree_util.tree_map_with_path(one, nnx.state(model, nnx.Param)))
    return model


@functools.cache
def formats(config: str) -> dict[str, str]:
    """Parameter path -> "fp8" or "fp4", of those that a checkpoint of this config (as JSON) quantises."""
    leaves = model_leaves(abstract_model(ModelConfig.from_dict(json.loads(config))))
    data = {path.removesuffix(".data"): leaf for path, leaf in leaves.items() if path.endswith(".data")}
    return {path: "fp4" if leaf.dtype == np.uint8 else "fp8" for path, leaf in data.items()}


@functools.partial(jax.jit, static_argnums=1)
def as_stored(w: jax.Array, form: str) -> jax.Array:
    return dequantize(quantized(w, form), w.dtype)


def quantized(w: jax.Array, form: str) -> QuantizedArray:
    return quantize_fp4(w) if form == "fp4" else quantize_fp8(w, (128, 128))


def round_weights(params, forms: dict[str, str]):
    """Every weight as its format would give it back; compiled once a shape."""

    def one(keys, w):
        form = forms.get(leaf_path(keys))
        return as_stored(w, form) if form else w

    return jax.tree_util.tree_map_with_path(one, params)


def entropy(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def losses(model: DeepseekV4, tokens: jax.Array, phase: Phase) -> tuple[jax.Array, dict[str, jax.Array]]:
    """tokens int32 [B, T + 2] -> what to minimise, and its parts."""
    T = tokens.shape[1] - 2
    streams, trace = dense.forward(model, tokens[:, :T], index=phase.index)
    following = tokens[:, 1 : T + 1]
    logits = dense.logits(model.hc_head, model.norm, model.lm_head, streams)
    main = entropy(logits, following).mean()
    parts, total = {"loss": main, "loads": jnp.stack(trace.loads)}, main
    if trace.index_losses:
        parts |= {
            "index_loss": jnp.stack(trace.index_losses).mean(),
            "recall": jnp.stack(trace.recalls)[..., -64:].mean(),
        }
        total += INDEX_WEIGHT * parts["index_loss"]
    if phase.drafts:
        drafted, _ = dense.draft(model, streams, following)
        guess = dense.logits(model.mtp[0].hc_head, model.mtp[0].norm, model.lm_head, drafted)
        parts["draft_loss"] = entropy(guess, tokens[:, 2:]).mean()
        parts["agree"] = (guess[:, :-1].argmax(-1) == logits[:, 1:].argmax(-1)).mean()
        if phase.alone:
            target = jax.lax.stop_gradient(jax.nn.softmax(logits[:, 1:]))
            return optax.softmax_cross_entropy(guess[:, :-1], target).mean(), parts
        total += MTP_WEIGHT * parts["draft_loss"]
    return total, parts


def make_step(config, phase: Phase, transformation, graph, rest):
    """One update, compiled: (params, optimiser state, tokens) -> the same, and the parts of the loss."""
    forms = formats(json.dumps(config)) if phase.rounding else {}

    def loss(params, tokens):
        if phase.alone:
            params = jax.tree_util.tree_map_with_path(
                lambda keys, w: w if leaf_path(keys).startswith("mtp") else jax.lax.stop_gradient(w), params
            )
        return losses(nnx.merge(graph, params, rest), tokens, phase)

    @functools.partial(jax.jit, donate_argnums=2)
    def compiled(params, stored, state, tokens):
        (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(stored, tokens)
        change, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, change)
        loads = parts.pop("loads")
        return params if phase.alone else follow_load(params, loads), state, parts

    def update(params, state, tokens):
        """The gradient at the rounded weights moves the ones they were rounded from (straight through)."""
        stored = round_weights(params, forms) if forms else params
        return compiled(params, stored, state, tokens)

    return update


def follow_load(params, loads):
    """Raise the selection bias of experts that got less than their share, lower the others'."""
    rows = iter(loads)

    def one(keys, w):
        path = leaf_path(keys)
        if not (path.startswith("layers") and path.endswith("e_score_correction_bias")):
            return w
        load = next(rows)
        return w + BIAS_STEP * jnp.sign(1 / load.shape[0] - load)

    return jax.tree_util.tree_map_with_path(one, params)


def batches(ids: np.ndarray, rows: int, length: int, seed: int):
    """Endless random rows of length + 2 tokens, each beginning with the official mark."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(ids) - length - 1, rows)
        yield np.stack([np.concatenate([[corpus.BOS], ids[s : s + length + 1]]) for s in starts]).astype(np.int32)


def schedule(phase: Phase) -> optax.Schedule:
    """A warm-up of 50 steps, then a straight line."""
    first, last = phase.rate
    ramp = optax.linear_schedule(0.0, first, min(50, phase.steps))
    return optax.join_schedules([ramp, optax.linear_schedule(first, last, max(1, phase.steps - 50))], [50])


def structure(config: dict[str, Any], phase: Phase, seed: int):
    """The phase's model without its parameters: graph, and buffers (from `initialise` with this seed) and constants."""
    numerics = StraightThrough() if phase.rounding else ExactNumerics()
    model = jax.eval_shape(lambda: build(config, phase.length, numerics))
    model.rope_main.fill()
    model.rope_compress.fill()
    parts: Any = nnx.split(model, nnx.Param, ...)
    drawn: Any = nnx.split(initialise(config, seed), nnx.Param, ...)
    (graph, _, rest), known = parts, drawn[2]
    keyed = {leaf_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(known)[0]}
    fill = lambda keys, leaf: keyed[leaf_path(keys)] if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    return graph, jax.tree_util.tree_map_with_path(fill, rest)


class Run:
    """A training run that can be stopped and taken up again: everything it knows lies in `out`."""

    def __init__(self, out: Path, config: dict[str, Any], seed: int):
        self.out, self.config, self.seed = out, config, seed
        out.mkdir(parents=True, exist_ok=True)
        training, held_out = corpus.split_text(corpus.read_text())
        self.tokenizer = corpus.train_tokenizer(training, config["vocab_size"])
        self.ids = np.concatenate(corpus.encode(self.tokenizer, training))
        model = initialise(config, seed)
        self.params: Any = nnx.split(model, nnx.Param, ...)[1]
        self.curve = out / "curve.csv"
        if not self.curve.exists():
            self.curve.write_text("phase,step,seconds,loss,draft_loss,agree,index_loss,recall\n")

    def train(self, phase: Phase, save_every: int = 200) -> None:
        """Run a phase from where it stopped; nothing where it has been finished."""
        labels = jax.tree_util.tree_map_with_path(lambda keys, w: self._label(phase, leaf_path(keys), w), self.params)
        transformation = optimizer.make(schedule(phase), labels)
        state, first = transformation.init(self.params), 0
        if self._file(phase).exists():
            self.params, state, first = self._read(phase, state)
        if first >= phase.steps:
            return
        graph, rest = structure(self.config, phase, self.seed)
        update, began = make_step(self.config, phase, transformation, graph, rest), time.time()
        data = batches(self.ids, phase.rows, phase.length, self.seed + first + 1000 * hash_name(phase.name))
        for number in range(first, phase.steps):
            self.params, state, parts = update(self.params, state, next(data))
            if number % 20 == 0:
                self._note(phase, number, time.time() - began, parts)
            if number % save_every == save_every - 1:
                self._write(phase, state, number + 1)
        self._write(phase, state, phase.steps)

    @staticmethod
    def _label(phase: Phase, path: str, w) -> str:
        return "frozen" if phase.alone and not path.startswith("mtp") else optimizer.label(path, w)

    def _file(self, phase: Phase) -> Path:
        return self.out / f"{phase.name}.npz"

    def _write(self, phase: Phase, state, number: int) -> None:
        leaves = jax.device_get(jax.tree.leaves((self.params, state)))
        unfinished = self.out / "unfinished.npz"
        np.savez(unfinished, *leaves, number=number)
        unfinished.replace(self._file(phase))

    def _read(self, phase: Phase, state):
        with np.load(self._file(phase)) as file:
            leaves = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(file.files) - 1)]
            number = int(file["number"])
        params, state = jax.tree.unflatten(jax.tree.structure((self.params, state)), leaves)
        return params, state, number

    def _note(self, phase: Phase, number: int, seconds: float, parts) -> None:
        value = lambda name: f"{float(parts[name]):.4f}" if name in parts else ""
        names = ("loss", "draft_loss", "agree", "index_loss", "recall")
        line = ",".join((phase.name, str(number), f"{seconds:.0f}", *map(value, names)))
        with self.curve.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def export(self, directory: Path) -> None:
        """The checkpoint in the official format and quantisation, its tokenizer, the loss curve."""
        _, rest = structure(self.config, PHASES[0], self.seed)
        leaves: Any = {
            leaf_path(keys): np.asarray(w) for keys, w in jax.tree_util.tree_flatten_with_path(self.params)[0]
        }
        np.savez(self.out / "params.npz", **leaves)
        arrays = stored_arrays(self.config, self.params, rest)
        save(arrays, self.config, directory, force=True)
        self.tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(
            json.dumps(TOKENIZER_CONFIG, indent=2, ensure_ascii=False) + "\n"
        )
        (directory / "curve.csv").write_text(self.curve.read_text())


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": corpus.SPECIAL[0],
    "eos_token": corpus.SPECIAL[1],
    "pad_token": corpus.SPECIAL[2],
    "add_bos_token": False,
    "add_eos_token": False,
}


def stored_arrays(config: dict[str, Any], params, rest) -> dict[str, jax.Array]:
    """Leaf path -> array, quantised, of everything that a checkpoint of this config holds."""
    keyed = jax.tree_util.tree_flatten_with_path((params, rest))[0]
    leaves = {leaf_path(keys).split(".", 1)[1]: w for keys, w in keyed}  # without the pair's index
    forms = formats(json.dumps(config))
    arrays: dict[str, jax.Array] = {}
    for path, w in leaves.items():
        if path in forms:
            coded = quantized(w, forms[path])
            assert coded.scale is not None
            arrays |= {f"{path}.data": coded.data, f"{path}.scale": coded.scale}
        else:
            arrays[path] = w
    known = model_leaves(abstract_model(ModelConfig.from_dict(config)))
    return {path: arrays[path] for path in known}  # the rest are RoPE tables


def hash_name(name: str) -> int:
    """A small number that follows from a name."""
    return sum(map(ord, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--work", type=Path, help="where the run's state lies (default: OUT with .run)")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on every phase's steps")
    parser.add_argument("--only", nargs="*", help="names of the phases to run (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run = Run(args.work or args.out.with_suffix(".run"), CONFIG, args.seed)
    for phase in PHASES:
        if args.only is None or phase.name in args.only:
            run.train(dataclasses.replace(phase, steps=max(1, round(phase.steps * args.steps))))
            run.export(args.out)


if __name__ == "__main__":
    main()
