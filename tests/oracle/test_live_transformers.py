"""A fresh random checkpoint through transformers and through this project: the same logits and greedy tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
import dsv4_jax
from checkpoints.synth import synth
from dsv4_jax.presets import PRESETS

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install dsv4-jax[oracle]")

from benchmarks.peer_transformers import load_peer, run_once  # noqa: E402  (imports torch)

# Every kind of layer, hashed and routed; more entries than the indexer may pick; a partial fp8 block (192 = 1.5 x 128).
CONFIG = PRESETS["flash"] | {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_hash_layers": 2,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 4,
    "head_dim": 128,
    "q_lora_rank": 192,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 32,
    "index_n_heads": 16,
    "index_head_dim": 64,
    "index_topk": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "compress_ratios": [0, 4, 128, 4],
}
EXPERT_DTYPES = {"bf16": None, "fp8": "fp4", "fp8base": "fp8"}
PROMPT, NEW_TOKENS = 300, 24
MAX_ABS, MEAN_ABS = 5e-3, 5e-5  # float32 implementations agree to 2.4e-4 and 8e-6; logits spread by about 1


@pytest.fixture(scope="module", params=EXPERT_DTYPES)
def both(request, tmp_path_factory):
    """Our model and transformers', from the same files."""
    expert_dtype = EXPERT_DTYPES[request.param]
    config = CONFIG | {"expert_dtype": expert_dtype}
    if expert_dtype is None:
        config = {k: v for k, v in config.items() if k not in ("expert_dtype", "quantization_config")}
    path = synth(config, tmp_path_factory.mktemp("oracle") / request.param, seed=7)
    with jax.default_matmul_precision("highest"):
        ours = checkpoints.load(path, max_tokens=PROMPT + NEW_TOKENS, dtype=jnp.float32, numerics="exact")
        yield ours, load_peer(path)


def tokens(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], shape, dtype=np.int32)


def test_logits_of_a_prefill_agree(both):
    ours, theirs = both
    ids = tokens((2, PROMPT), seed=1)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    actual = np.asarray(dsv4_jax.logits(ours, ids))
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float32
    assert expected.std() > 0.3, "logits this flat would pass by accident"
    error = np.abs(actual - expected)
    assert error.max() <= MAX_ABS and error.mean() <= MEAN_ABS, (error.max(), error.mean())


def test_greedy_tokens_agree(both):
    ours, theirs = both
    ids = tokens((1, PROMPT), seed=2)
    expected = run_once(theirs, torch.from_numpy(ids.astype(np.int64)), NEW_TOKENS)["tokens"]
    actual = dsv4_jax.generate(ours, ids, max_new_tokens=NEW_TOKENS).tokens.tolist()
    assert actual == expected


def test_the_check_can_fail(both):
    """One stream weight changed by 10 % moves the logits past the tolerance."""
    ours, theirs = both
    ids = tokens((2, PROMPT), seed=3)
    scale = theirs.model.layers[2].attn_hc.scale
    original = scale.data.clone()
    try:
        scale.data.mul_(1.1)
        with torch.inference_mode():
            expected = theirs(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    finally:
        scale.data.copy_(original)
    error = np.abs(np.asarray(dsv4_jax.logits(ours, ids)) - expected)
    assert error.mean() > MEAN_ABS
