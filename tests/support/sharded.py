"""What test_sharding.py runs in a process with several simulated devices: `python sharded.py CHECK ARGUMENTS...`.

Each check fails by an assertion, and prints what it found as a line of JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import checkpoints
import dsv4_jax
from checkpoints.source import open_source
from dsv4_jax.dispatch import capacity, run_experts
from dsv4_jax.generate.alone import PIECE, continue_alone, head_alone
from dsv4_jax.kernels import XlaKernels
from dsv4_jax.sharding import Parallel, make_mesh, named_mesh, parse_mesh

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(case: str, mesh: str) -> dict:
    """Greedy tokens with drafts, and logits, of a golden checkpoint over a mesh."""
    path = GOLDEN / case
    axes = parse_mesh(mesh, open_source(path).config)
    model = checkpoints.load(path, mesh=axes, max_tokens=1024, dtype=jnp.float32, numerics="exact")
    want = np.load(f"{path}.greedy.npz")
    out = dsv4_jax.generate(model, want["prompt_ids"], max_new_tokens=16, drafts=2)
    assert out.tokens.tolist() == want["tokens"][:, :16].tolist()
    forward = np.load(f"{path}.forward.npz")
    error = np.abs(np.asarray(dsv4_jax.logits(model, forward["input_ids"])) - forward["logits"]).max()
    assert error < 5e-3
    return {"mesh": dict(axes.shape), "error": float(error)}


@dataclass(frozen=True)
class WatchedKernels(XlaKernels):
    """Notes how many queries are scored at a time."""

    def pick_entries(self, q, weights, keys, visible, *, top_k):
        scored.append(q.shape[1])
        return super().pick_entries(q, weights, keys, visible, top_k=top_k)


scored: list[int] = []


def sequence(case: str) -> dict:
    """Logits of a prompt whose indexer's queries are split over `model`: those of the golden data."""
    path = GOLDEN / case
    mesh = parse_mesh(f"model={len(jax.devices())}", open_source(path).config)
    options = {"max_tokens": 512, "dtype": jnp.float32, "numerics": "exact"}
    model = checkpoints.load(path, mesh=mesh, kernels=WatchedKernels(), **options)
    forward = np.load(f"{path}.forward.npz")
    error = np.abs(np.asarray(dsv4_jax.logits(model, forward["input_ids"])) - forward["logits"]).max()
    assert error < 5e-3
    return {"tokens": forward["input_ids"].shape[1], "scored": sorted(set(scored)), "error": float(error)}


def dispatch(experts: int, tokens: int, expert: int, model: int) -> dict:
    """Any imbalance: what a dense sum over all experts gives, for even, random and completely one-sided routing."""
    mesh = named_mesh({"expert": expert, "model": model}, jax.devices())
    parallel, choices, width = Parallel(1, expert, model, mesh), 3, 16
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(experts, width, width)).astype(np.float32)
    x = rng.normal(size=(expert * tokens, width)).astype(np.float32)
    weights = rng.uniform(size=(len(x), choices)).astype(np.float32)
    real = rng.random(len(x)) < 0.9
    one_sided = np.broadcast_to(np.arange(choices), (len(x), choices))
    even = np.stack([rng.permutation(experts)[:choices] for _ in x])
    held = experts // parallel.expert_shards
    worst = 0.0

    def device(x, index, weights, real, matrices):
        def run(x, index, weights):
            assert x.shape[0] <= max(tokens, expert * capacity(tokens, choices, expert))
            chosen = (index[..., None] == jnp.arange(held)) * weights[..., None]
            return jnp.einsum("nae,nk,eok->no", chosen, x, matrices)

        return parallel.sum_model(run_experts(x, index, weights, real, experts, parallel, run))

    rows, held_by = parallel.batch_spec, parallel.spec("mlp.experts.down_proj")
    sharded = jax.jit(parallel.shard(device, (rows, rows, rows, rows, held_by), rows))
    for index in (even, one_sided, one_sided + experts - choices):
        got = np.asarray(sharded(x, index.astype(np.int32), weights, real, matrices))
        want = np.einsum("nak,na->nk", np.einsum("naok,nk->nao", matrices[index], x), weights) * real[:, None]
        worst = max(worst, float(np.abs(got - want).max()))
    assert worst < 1e-4
    return {"error": worst, "room": capacity(tokens, choices, expert), "tokens": tokens}


def same_bits(case: str, batch: int) -> dict:
    """The deterministic mode: logits of a row alone, in a batch, and over four data shards, to the bit."""
    config = open_source(GOLDEN / case).config
    load = partial(checkpoints.load, GOLDEN / case, max_tokens=64, dtype=jnp.float32, numerics="exact")
    alone = load(mesh=named_mesh({}, jax.devices()[:1]))
    spread = load(mesh=named_mesh({"data": 4}, jax.devices()))
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, config.vocab_size, (batch, 16)).astype(np.int32)
    lengths = np.resize(np.array([16, 5, 1, 12], np.int32), batch)

    def score(model, tokens, lengths):
        cache = model.init_cache(len(tokens))
        streams, cache = continue_alone(model, tokens, cache, lengths, PIECE)
        last = jnp.take_along_axis(streams, (lengths - 1)[:, None, None, None], axis=1)
        after, _ = continue_alone(model, jnp.tile(tokens[:, :1], (1, 3)), cache, jnp.full_like(lengths, 3), 1)
        return head_alone(model, jnp.concatenate([last, after], axis=1))

    def over(model, rows):
        parallel = model.parallel
        row = parallel.batch_spec
        run = parallel.shard(score, (parallel.specs(model), row, row), row)
        return np.asarray(jax.jit(run)(model, tokens[rows], lengths[rows]))

    whole = over(alone, slice(None))
    assert (over(spread, slice(None)) == whole).all()
    for row in (0, 2, batch - 1):
        assert (over(alone, slice(row, row + 1)) == whole[row : row + 1]).all(), row
    generate = partial(dsv4_jax.generate, lengths=lengths, max_new_tokens=8, deterministic=True)
    texts = [generate(m, tokens, drafts=k).tokens.tolist() for m, k in ((alone, 0), (spread, 2))]
    assert texts[0] == texts[1]
    if batch > 4:
        one = dsv4_jax.generate(alone, tokens[-1:], lengths=lengths[-1:], max_new_tokens=8, deterministic=True)
        assert one.tokens.tolist() == texts[0][-1:]
    plain = dsv4_jax.generate(alone, tokens, lengths=lengths, max_new_tokens=8).tokens
    return {"agrees_with_the_usual_mode": float((plain == texts[0]).mean())}


def quantised_over_model(path: str) -> dict:
    """FP8 and FP4 weights split over `model` and `expert`: the logits of one device.

    With official numerics for most tokens: a sum in another order now and then rounds to the neighbour in 8 bits.
    """
    prompt = np.random.default_rng(2).integers(1, 100, (3, 20))
    worst = []
    for numerics, over_tokens in (("exact", np.max), ("official", np.median)):
        load = partial(checkpoints.load, path, max_tokens=96, dtype=jnp.float32, numerics=numerics)
        one = load()
        want = np.asarray(dsv4_jax.logits(one, prompt))
        meshes = [make_mesh(one.config, "latency"), make_mesh(one.config, "throughput")]
        meshes.append(named_mesh({"expert": 2, "model": 2, "data": 2}, jax.devices()))
        for mesh in meshes:
            error = np.abs(np.asarray(dsv4_jax.logits(load(mesh=mesh), prompt)) - want).max(-1)
            worst.append(float(over_tokens(error)))
    assert max(worst) < 5e-5, worst
    return {"meshes": [dict(mesh.shape) for mesh in meshes], "errors": worst}


if __name__ == "__main__":
    check, *arguments = sys.argv[1:]
    numbers = [int(a) if a.isdigit() else a for a in arguments]
    print(json.dumps(globals()[check](*numbers)), flush=True)
