"""The router as a module, experts with quantised weights, and what a token's result may depend on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN

from dsv4_jax.config import LayerSpec, ModelConfig
from dsv4_jax.experts import MAX_BLOCK_ROWS, as_one, block_rows, expert_mlp, expert_mlp_in_blocks, slab_blocks
from dsv4_jax.kernels import XlaKernels
from dsv4_jax.moe import Router
from dsv4_jax.numerics import ExactNumerics
from dsv4_jax.presets import PRESETS
from dsv4_jax.quantized import FP4_BLOCK, QuantizedArray, Stack, dequantize
from pallas_kernels.expert_matmul.reference import pick_rows
from pallas_kernels.expert_rows import clamped_swiglu

pytestmark = pytest.mark.slow

EXACT = ExactNumerics()

E, A, M, F = 6, 2, 64, 32


def golden_router(hashed: bool) -> tuple[Router, dict[str, np.ndarray]]:
    """A router that sees the golden logits: x is the logits, the gate the identity."""
    want = dict(np.load(GOLDEN / "ops" / "router.npz"))
    experts = want["logits"].shape[1]
    fields = {"quantization_config": None, "expert_dtype": None, "hidden_size": experts, "n_routed_experts": experts}
    fields |= {"num_experts_per_tok": 4, "vocab_size": len(want["tid2eid"]), "routed_scaling_factor": 1.5}
    router = Router(ModelConfig.from_dict(PRESETS["tiny"] | fields), LayerSpec(0, hashed), jnp.float32)
    router.weight.set_value(jnp.eye(experts))
    if hashed:
        router.tid2eid.set_value(jnp.asarray(want["tid2eid"], jnp.int32))
    else:
        router.e_score_correction_bias.set_value(jnp.asarray(want["bias"]))
    return router, want


@pytest.mark.parametrize(("hashed", "name"), [(False, "topk"), (True, "hash")])
def test_router_chooses_and_weighs(hashed, name):
    router, want = golden_router(hashed)
    index, weights = router(jnp.asarray(want["logits"]), jnp.asarray(want["input_ids"], jnp.int32))
    got, expected = (np.zeros(want["logits"].shape) for _ in range(2))  # by expert: the order of a pick means nothing
    np.put_along_axis(got, np.asarray(index), np.asarray(weights), axis=1)
    np.put_along_axis(expected, want[f"{name}_indices"], want[f"{name}_weights_f64"], axis=1)
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * expected.max())


def test_bias_selects_but_does_not_weigh():
    router, want = golden_router(hashed=False)
    logits = jnp.asarray(want["logits"])
    router.e_score_correction_bias.set_value(jnp.zeros(16).at[:4].set(1e4))
    index, weights = router(logits, jnp.zeros(len(logits), jnp.int32))
    assert (np.sort(index) == np.arange(4)).all()
    scores = np.take_along_axis(want["score_f64"], np.asarray(index), axis=1)
    np.testing.assert_allclose(weights, 1.5 * scores / scores.sum(1, keepdims=True), rtol=0, atol=3e-6)


def quantised(shape: tuple[int, ...], packed: bool, rng) -> QuantizedArray:
    """Random codes, scales 2^-3 .. 2^1."""
    *lead, rows, columns = shape
    block = FP4_BLOCK if packed else (128, 128)
    grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    scale = jnp.asarray(rng.integers(124, 129, grid), jnp.uint8)
    if packed:
        return QuantizedArray(
            jnp.asarray(rng.integers(0, 256, (*lead, rows, columns // 2)), jnp.uint8), scale, block, True
        )
    return QuantizedArray(jnp.asarray(rng.standard_normal(shape), jnp.float8_e4m3fn), scale, block)


def in_blocks(*args):
    """`expert_mlp` by way of one grouped product for all blocks, as platforms with a kernel for it do.

    Blocks that are not used are poison, as memory that was never written may be.
    """
    return expert_mlp_in_blocks(*args[:7], PoisonKernels(), *args[7:])


class PoisonKernels(XlaKernels):
    def expert_product(self, x, row, expert, used, w):
        rows, w = pick_rows(x, row), as_one(w)
        values = dequantize(w, jnp.float32)[expert] if isinstance(w, QuantizedArray) else w[expert]
        out = jnp.einsum("brk,bnk->brn", rows.reshape(len(expert), -1, rows.shape[1]), values, precision="highest")
        return jnp.where(jnp.arange(len(expert))[:, None, None] < used, out, jnp.nan).reshape(len(rows), -1)


BOTH = pytest.mark.parametrize("experts", [expert_mlp, in_blocks], ids=["loop", "in blocks"])


def routed(n: int, rng, experts: int = E) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    index = np.stack([rng.permutation(experts)[:A] for _ in range(n)])
    x, weights = rng.standard_normal((n, M)), rng.random((n, A))
    return jnp.asarray(x, jnp.float32), jnp.asarray(index, jnp.int32), jnp.asarray(weights, jnp.float32)


def test_gradients_do_not_see_unused_blocks():
    rng = np.random.default_rng(7)
    x, _, weights = routed(5, rng)
    index = jnp.zeros((5, A), jnp.int32).at[:, 1].set(3)  # two experts for ten pairs
    gate_up, down = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((E, 2, F, M), (E, M, F)))
    loss = lambda experts: lambda *args: experts(args[0], index, *args[1:], 2.0, EXACT).sum()
    want, got = (jax.grad(loss(e), argnums=range(4))(x, weights, gate_up, down) for e in (expert_mlp, in_blocks))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@BOTH
@pytest.mark.parametrize("packed", [False, True], ids=["fp8", "fp4"])
@pytest.mark.parametrize("n", [1, 40])
def test_quantised_experts_equal_their_values(n, packed, experts):
    rng = np.random.default_rng(n)
    gate_up, down = quantised((E, 2, F, M), packed, rng), quantised((E, M, F), packed, rng)
    x, index, weights = routed(n, rng)
    got = experts(x, index, weights, gate_up, down, 2.0, EXACT)
    wide, back = (np.asarray(dequantize(w, jnp.float32), np.float64) for w in (gate_up, down))
    want = np.zeros((n, M))
    for t in range(n):
        for e, w in zip(np.asarray(index)[t], np.asarray(weights)[t], strict=True):
            gate, up = (wide[e, i] @ np.asarray(x[t], np.float64) for i in range(2))
            want[t] += back[e] @ (np.asarray(clamped_swiglu(jnp.asarray(gate), jnp.asarray(up), 2.0)) * w)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@BOTH
@pytest.mark.parametrize("chosen", [[0, 1], [4, 5], [0, 5]])
def test_experts_nobody_chose_are_not_read(chosen, experts):
    """Their weights may be NaN: at the front, at the end, in the middle."""
    rng = np.random.default_rng(0)
    x, _, weights = routed(24, rng)
    index = jnp.broadcast_to(jnp.asarray(chosen, jnp.int32), (24, A))
    gate_up, down = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((E, 2, F, M), (E, M, F)))
    spoil = lambda w: jnp.full_like(w, jnp.nan).at[np.asarray(chosen)].set(w[np.asarray(chosen)])
    got = experts(x, index, weights, spoil(gate_up), spoil(down), 2.0, EXACT)
    np.testing.assert_array_equal(got, experts(x, index, weights, gate_up, down, 2.0, EXACT))


def test_a_token_does_not_depend_on_the_others():
    rng = np.random.default_rng(1)
    gate_up, down = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((E, 2, F, M), (E, M, F)))
    x, index, weights = routed(32, rng)
    others = routed(32, rng)
    mixed = [mine.at[:16].set(other[:16]) for mine, other in zip((x, index, weights), others, strict=True)]
    whole = expert_mlp(x, index, weights, gate_up, down, 2.0, EXACT)
    changed = expert_mlp(*mixed, gate_up, down, 2.0, EXACT)
    np.testing.assert_array_equal(changed[16:], whole[16:])
    alone = expert_mlp(x[16:17], index[16:17], weights[16:17], gate_up, down, 2.0, EXACT)
    np.testing.assert_allclose(alone[0], whole[16], rtol=0, atol=2e-6 * np.abs(whole).max())


@pytest.mark.parametrize("slab_rows", [8, 40])
@pytest.mark.parametrize("skewed", [False, True])
def test_slabs_change_nothing(slab_rows, skewed, monkeypatch):
    """Of 16 experts the first 3 are held: whether few pairs are theirs or all, and however many slabs that takes."""
    rng, held, many = np.random.default_rng(2), 3, 16
    gate_up, down = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((held, 2, F, M), (held, M, F)))
    x, index, weights = routed(90, rng, held if skewed else many)
    args = jnp.minimum(index, held), weights, gate_up, down, 2.0, EXACT, many
    count = slab_blocks(90, A, held, many, block_rows(90 * A, many))
    want = in_blocks(x, *args)
    monkeypatch.setattr("dsv4_jax.experts.SLAB_ROWS", slab_rows)
    assert slab_blocks(90, A, held, many, block_rows(90 * A, many)) < count
    got = jax.jit(in_blocks, static_argnums=(5, 6, 7))(x, *args)
    np.testing.assert_allclose(want, expert_mlp(x, *args), rtol=0, atol=2e-6 * np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
    alone = jax.jit(in_blocks, static_argnums=(5, 6, 7))(x[:45], *(a[:45] for a in args[:2]), *args[2:])
    np.testing.assert_array_equal(alone, got[:45])


@pytest.mark.parametrize("packed", [False, True], ids=["fp8", "fp4"])
@pytest.mark.parametrize("n", [1, 8])
def test_pairs_written_out_equal_the_loop(n, packed, monkeypatch):
    rng = np.random.default_rng(n)
    many = 16  # experts, so that the loop takes one pair at a time
    gate_up, down = quantised((many, 2, F, M), packed, rng), quantised((many, M, F), packed, rng)
    args = *routed(n, rng, many), gate_up, down, 2.0, EXACT
    got = expert_mlp(*args)
    monkeypatch.setattr("dsv4_jax.experts.FEW_PAIRS", 0)
    want = expert_mlp(*args)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "formerly quantised"])
@pytest.mark.parametrize(("n", "many"), [(1, 16), (1, 32), (2, 16), (8, 16)])
def test_experts_that_lie_apart_equal_the_loop(n, many, marked):
    """The pairs of one token by branches, more pairs or experts by a product of each expert and all tokens."""
    rng = np.random.default_rng(n)
    gate_up, down = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((many, 2, F, M), (many, M, F)))
    x, index, weights = routed(n, rng, many)
    index = index.at[0, 1].set(index[0, 0])  # a table of hashes may name an expert twice
    apart = [Stack.of(w, np.asarray(w)) for w in (gate_up, down)]
    apart = [QuantizedArray(w, None, (128, 128)) for w in apart] if marked else apart
    got = jax.jit(lambda *args: expert_mlp(*args, 2.0, EXACT))(x, index, weights, *apart)
    want = expert_mlp(x, index, weights, gate_up, down, 2.0, EXACT)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("pairs", "experts", "rows"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (24, 8, 4), (32, 8, 4), (10**6, 8, MAX_BLOCK_ROWS)]
)
def test_rows_of_a_block_follow_the_mean_load(pairs, experts, rows):
    assert block_rows(pairs, experts) == rows
