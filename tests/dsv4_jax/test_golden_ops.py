"""Every building block against the operator data: 2e-6 of the largest value in float32, codes and tables exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import GOLDEN

from dsv4_jax.cache import CompressorCache, Step
from dsv4_jax.compressor import Compressor, entry_index
from dsv4_jax.config import LayerSpec, ModelConfig, Yarn
from dsv4_jax.hyper_connection import HyperConnection, HyperHead
from dsv4_jax.kernels import XlaKernels
from dsv4_jax.linear import linear, matmul
from dsv4_jax.moe import router_scores
from dsv4_jax.numerics import OfficialNumerics
from dsv4_jax.presets import PRESETS
from dsv4_jax.quantized import FP4_BLOCK, QuantizedArray, dequantize, quantize_fp8
from dsv4_jax.rope import RopeSpec, RopeTable, Rotation, apply_rope, build_table
from dsv4_jax.streams import split_mix
from pallas_kernels.expert_rows import clamped_swiglu
from pallas_kernels.formats import decode_e2m1, decode_e4m3, decode_e8m0, unpack_fp4
from pallas_kernels.index_rows import dequantize_index_rows, quantize_index_rows
from pallas_kernels.index_topk import index_scores, pick_entries, pick_entries_xla
from pallas_kernels.kv_rows import dequantize_rows, quantize_rows
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.round_index import round_fp4
from pallas_kernels.round_rows import round_rows
from pallas_kernels.routing import routing_weights
from pallas_kernels.sparse_mla import Indices, Mask, Window, sparse_mla, sparse_mla_xla

SPECS = {
    "main": RopeSpec(10000.0, 64),
    "compress_plain": RopeSpec(160000.0, 64),
    "compress_yarn": RopeSpec(160000.0, 64, Yarn(16.0, 65536)),
}


def data(name: str):
    return np.load(GOLDEN / "ops" / f"{name}.npz")


def close(got, want, tolerance: float = 2e-6) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def as_fp8(codes: np.ndarray) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn)


# --- RoPE


@pytest.mark.parametrize("name", SPECS)
def test_inverse_frequencies_bit_for_bit(name):
    np.testing.assert_array_equal(SPECS[name].inv_freq(), data("rope")[f"{name}.inv_freq_f32"])


@pytest.mark.parametrize("name", SPECS)
def test_table_at_positions_up_to_a_million(name):
    """cos and sin of the fp32 angle, to 1e-6; the angle's own rounding keeps them within 0.06 of the true ones."""
    want = data("rope")
    table = jax.jit(build_table, static_argnums=(0, 1))(SPECS[name], 1 << 20)
    at = want["positions"]
    assert at.max() == (1 << 20) - 1
    for got, what in ((table.cos, "cos"), (table.sin, "sin")):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got[at], want[f"{name}.{what}_of_angle_f32"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(got[at], want[f"{name}.{what}_f64"], rtol=0, atol=0.06)


@pytest.mark.parametrize("name", SPECS)
def test_rotation_and_its_inverse(name):
    want = data("rope")
    at = want[f"{name}.angle_f32"]
    rotation = Rotation(jnp.asarray(np.cos(at.astype(np.float64)), jnp.float32)[:, None],
                        jnp.asarray(np.sin(at.astype(np.float64)), jnp.float32)[:, None])  # fmt: skip
    x = jnp.asarray(want["x"])
    turned = apply_rope(x, rotation)
    close(turned, want[f"{name}.rotated_angle_f32"])
    close(apply_rope(turned, rotation, inverse=True), x)
    np.testing.assert_array_equal(turned[..., :32], x[..., :32])  # only the trailing 64 channels turn
    small = at.max(1) < 1000  # where the fp32 angle is exact enough, the conjugate matches the true one
    close(apply_rope(x, rotation, inverse=True)[small], want[f"{name}.inverse_rotated_f64"][small], 1e-4)


def test_rope_takes_two_table_dtypes_and_no_other():
    x = jnp.ones((2, 3, 8), jnp.bfloat16)
    table = lambda dtype: Rotation(jnp.full((3, 2), 0.6, dtype), jnp.full((3, 2), 0.8, dtype))
    for dtype in (jnp.float32, jnp.bfloat16):
        out = apply_rope(x, table(dtype))
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out[0, 0, 4:], np.float32), [-0.2, 1.4, -0.2, 1.4], atol=1e-2)
    for dtype in (jnp.float16, jnp.int32):
        with pytest.raises(TypeError, match="give it in float32 or in x's bfloat16"):
            apply_rope(x, table(dtype))
    with pytest.raises(TypeError):
        apply_rope(jnp.ones((3, 8), jnp.float32), table(jnp.bfloat16))


# --- number formats


def test_every_code_point():
    fp8, fp4 = data("fp8_weights"), data("fp4")
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(decode_e4m3(as_fp8(every)), fp8["e4m3_table_f32"])
    np.testing.assert_array_equal(np.asarray(decode_e8m0(jnp.asarray(every)), np.float64), fp8["e8m0_table_f64"])
    np.testing.assert_array_equal(decode_e2m1(jnp.arange(16, dtype=jnp.uint8)), fp4["code_values_f32"])


@pytest.mark.parametrize("case", ["exact", "partial", "small"])
def test_fp8_weights(case):
    want = data("fp8_weights")
    weight = QuantizedArray(as_fp8(want[f"{case}.weight_fp8_bytes"]), jnp.asarray(want[f"{case}.scale_e8m0_bytes"]))
    np.testing.assert_array_equal(dequantize(weight, jnp.float32), want[f"{case}.dequant_f32"])
    np.testing.assert_array_equal(np.asarray(dequantize(weight, jnp.bfloat16), np.float32), want[f"{case}.dequant_f32"])
    close(linear(jnp.asarray(want[f"{case}.x"]), weight), want[f"{case}.y_weight_only_f64"])


def test_fp4_weights():
    want = data("fp4")
    packed = jnp.asarray(want["weight_packed_int8"].view(np.uint8))
    weight = QuantizedArray(packed, jnp.asarray(want["weight_scale_e8m0_bytes"]), FP4_BLOCK, packed=True)
    assert weight.shape == (40, 256)
    np.testing.assert_array_equal(dequantize(weight, jnp.float32), want["weight_dequant_f32"])
    close(linear(jnp.asarray(want["x"]), weight), want["y_weight_only_f64"])


def test_bfloat16_products_accumulate_in_float32():
    x, w = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((1, 4096), jnp.bfloat16).at[0, 0].set(1 / 128)
    assert matmul(x, w).dtype == jnp.float32 and float(matmul(x, w)[0, 0]) == 4095 + 1 / 128


# --- layers


def test_rms_norm():
    want = data("rmsnorm")
    x = jnp.asarray(want["x"])
    close(rms_norm(x, jnp.asarray(want["weight"]), eps=1e-6), want["weighted_f64"])
    close(rms_norm(x, None, eps=1e-6), want["unweighted_f64"])


@pytest.mark.parametrize(("name", "n", "iterations"), [("hc4_it20", 4, 20), ("hc4_it1", 4, 1), ("hc2_it20", 2, 20)])
def test_stream_mixing_weights(name, n, iterations):
    want = data("hyper_connections")
    mixes, base, scale = (jnp.asarray(want[f"{name}.{x}"]) for x in ("mixes", "base", "scale"))
    for got, what in zip(split_mix(mixes, base, scale, n, iterations, 1e-6), ("pre", "post", "comb"), strict=True):
        close(got, want[f"{name}.{what}_f64"])


def small_config(**fields) -> ModelConfig:
    return ModelConfig.from_dict(PRESETS["tiny"] | {"quantization_config": None, "expert_dtype": None} | fields)


def test_hyper_connection_block_and_head():
    want = data("hyper_connections")
    config = small_config(hidden_size=96)
    block, head = HyperConnection(config), HyperHead(config)
    for module, name in ((block, "block"), (head, "head")):
        for part in ("fn", "base", "scale"):
            getattr(module, part).set_value(jnp.asarray(want[f"{name}.{part}"]))
    streams = jnp.asarray(want["block.x"])[None]
    x, (post, comb) = block.collapse(streams)
    close(x[0], want["block.collapsed_f64"])
    close(post[0], want["block.post_f64"])
    close(comb[0], want["block.comb_f64"])
    out = block.expand(jnp.asarray(want["block.sublayer_out"])[None], streams, (post, comb))
    close(out[0], want["block.streams_out_f64"])
    close(head(streams)[0], want["head.collapsed_f64"])


@pytest.mark.parametrize(("name", "ratio"), [("csa4", 4), ("hca8", 8), ("hca128", 128)])
def test_compressor_entries(name, ratio):
    """Projections that select: x holds kv and gate side by side, so the module pools exactly the golden rows."""
    want = data("compressor")
    kv, gate = want[f"{name}.kv"], want[f"{name}.gate"]
    T, width = kv.shape
    config = small_config(hidden_size=2 * width, qk_rope_head_dim=16, head_dim=32, index_head_dim=32)
    module = Compressor(config, LayerSpec(ratio, hashed=False), XlaKernels(), 32, jnp.float32)
    select = jnp.eye(2 * width)
    module.kv_proj.set_value(select[:width])
    module.gate_proj.set_value(select[width:])
    module.position_bias.set_value(jnp.asarray(want[f"{name}.ape"]))
    module.kv_norm.weight.set_value(jnp.asarray(want[f"{name}.norm_weight"]))
    entries = want[f"{name}.entry_f64"]
    rows = jnp.zeros((1, ratio * (2 if ratio == 4 else 1), width))
    cache = CompressorCache(rows, rows, jnp.full((1, len(entries) + 2, 32), 7.0))
    step = Step(jnp.zeros((1, T), jnp.int32), jnp.zeros(1, jnp.int32), jnp.asarray([T]))
    table = RopeTable(RopeSpec(160000.0, 16), 512)
    projected = module.project(jnp.asarray(np.concatenate([kv, gate], axis=1))[None], step)
    store = lambda rows, norm, rotation, held: apply_rope(norm(rows), rotation)
    after = module(projected, table(entry_index(step, ratio) * ratio), cache, step, store)
    close(after.entries[0, : len(entries)], entries)
    assert len(entries) == T // ratio and (after.entries[0, len(entries) :] == 7.0).all()  # no unfinished window


def test_router():
    want = data("router")
    logits, top_k, factor = want["logits"], int(want["top_k"]), float(want["routed_scaling_factor"])
    scores = router_scores(jnp.asarray(logits), jnp.eye(logits.shape[1]))
    close(scores, want["score_f64"])
    index = jax.lax.top_k(scores + jnp.asarray(want["bias"]), top_k)[1]
    np.testing.assert_array_equal(np.sort(index), np.sort(want["topk_indices"]))
    weights = routing_weights(scores, jnp.asarray(want["topk_indices"]), factor)
    close(weights, want["topk_weights_f64"])
    hashed = jnp.asarray(want["tid2eid"], jnp.int32)[want["input_ids"]]
    np.testing.assert_array_equal(hashed, want["hash_indices"])
    close(routing_weights(scores, hashed, factor), want["hash_weights_f64"])


@pytest.mark.parametrize(
    ("limit", "name"), [(10.0, "out_limit10_f64"), (2.0, "out_limit2_f64"), (np.inf, "out_nolimit_f64")]
)
def test_swiglu(limit, name):
    want = data("swiglu")
    close(clamped_swiglu(jnp.asarray(want["gate"]), jnp.asarray(want["up"]), limit), want[name])


# --- attention and selection


@pytest.mark.parametrize("op", [sparse_mla, sparse_mla_xla])
def test_sparse_attention(op):
    want = data("sparse_attention")
    q, T = jnp.asarray(want["q"])[None], want["q"].shape[0]
    nothing = Window(jnp.zeros((1, 1, q.shape[-1])), jnp.full((1, 1), -1), size=1)
    picks = Indices(jnp.asarray(want["indices"])[None])
    entries, sinks = jnp.asarray(want["kv"])[None], jnp.asarray(want["sink"])
    out = op(q, jnp.arange(T)[None], nothing, entries, picks, sinks, scale=float(want["scale"]))
    close(out[0], want["out_f64"])


@pytest.mark.parametrize("op", [pick_entries, pick_entries_xla])
def test_index_selection(op):
    want = data("indexer")
    q, k = jnp.asarray(want["q"])[None], jnp.asarray(want["k"])[None]
    heads, dim = want["q"].shape[1:]
    weights = jnp.asarray(want["weights_raw"])[None] * (heads**-0.5 * dim**-0.5)
    visible = jnp.asarray(want["visible_entries"], jnp.int32)[None]
    seen = np.arange(k.shape[1]) < np.asarray(visible)[0][:, None]
    scores = np.asarray(index_scores(q, weights, k))[0]
    finite = seen & np.isfinite(want["score_f64"])
    np.testing.assert_allclose(
        scores[finite], want["score_f64"][finite], atol=2e-6 * np.abs(want["score_f64"][finite]).max()
    )
    picks = op(q, weights, k, visible, top_k=int(want["top_k"]))
    if isinstance(picks, Mask):
        got = np.asarray(picks.mask)[0]
    else:
        index = np.asarray(picks.index)[0]
        got = np.zeros((len(index), k.shape[1] + 1), bool)
        np.put_along_axis(got, index, True, axis=1)
        got = got[:, :-1]
    np.testing.assert_array_equal(got, want["selected"])


# --- activation rounding


@pytest.mark.parametrize("group", [128, 64])
def test_fp8_activations_bit_for_bit(group):
    want = data("fp8_act_quant")
    x = jnp.asarray(want["x"])
    coded = quantize_fp8(x, (1, group))
    np.testing.assert_array_equal(np.asarray(coded.data).view(np.uint8), want[f"b{group}.fp8_bytes"])
    np.testing.assert_array_equal(coded.scale, want[f"b{group}.scale_e8m0_bytes"])
    np.testing.assert_array_equal(dequantize(coded, jnp.float32), want[f"b{group}.dequant_f32"])
    np.testing.assert_array_equal(round_rows(x, group), want[f"b{group}.dequant_f32"])
    np.testing.assert_array_equal(
        np.asarray(round_rows(x.astype(jnp.bfloat16), group), np.float32), want[f"b{group}.dequant_f32"]
    )


def test_fp4_activations_bit_for_bit():
    want = data("fp4")
    x = jnp.asarray(want["act_x"])
    coded, half = quantize_index_rows(x), x.shape[-1] // 2
    np.testing.assert_array_equal(unpack_fp4(coded.data[..., :half]), want["act_codes"])
    np.testing.assert_array_equal(coded.data[..., half:], want["act_scale_e8m0_bytes"])
    np.testing.assert_array_equal(dequantize_index_rows(coded, jnp.float32), want["act_dequant_f32"])
    np.testing.assert_array_equal(round_fp4(x), want["act_dequant_f32"])


def test_indexer_rounding_bit_for_bit():
    want = data("fp4")
    x = jnp.asarray(want["hadamard_then_fp4_in"], jnp.bfloat16)  # the reference rounds to bfloat16 in between
    np.testing.assert_array_equal(np.asarray(OfficialNumerics().index(x), np.float32), want["hadamard_then_fp4_f32"])


def test_kv_rounding_bit_for_bit():
    want = data("kv_rounding")
    x = jnp.asarray(want["x"])
    np.testing.assert_array_equal(OfficialNumerics().kv(x, 64), want["rounded_f32"])
    stored = dequantize_rows(quantize_rows(x, 64), jnp.float32)  # so rows for an 8-bit cache need no rounding before
    np.testing.assert_array_equal(stored[..., :-64], want["rounded_f32"][..., :-64])


@pytest.mark.parametrize("case", ["exact", "partial", "small"])
def test_fp8_products_with_rounded_activations(case):
    want = data("fp8_weights")
    weight = QuantizedArray(as_fp8(want[f"{case}.weight_fp8_bytes"]), jnp.asarray(want[f"{case}.scale_e8m0_bytes"]))
    x = OfficialNumerics().activations(jnp.asarray(want[f"{case}.x"]), weight)
    close(linear(x, weight), want[f"{case}.y_act_quant_f64"])


def test_fp4_products_with_rounded_activations():
    want = data("fp4")
    packed = jnp.asarray(want["weight_packed_int8"].view(np.uint8))
    weight = QuantizedArray(packed, jnp.asarray(want["weight_scale_e8m0_bytes"]), FP4_BLOCK, packed=True)
    close(linear(OfficialNumerics().activations(jnp.asarray(want["x"]), weight), weight), want["y_act_quant_f64"])


def test_weights_stored_wide_get_wide_activations():
    x = jnp.asarray(data("fp4")["x"])
    assert OfficialNumerics().activations(x, jnp.eye(256)) is x
