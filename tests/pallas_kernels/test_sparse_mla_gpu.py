"""The GPU kernel of sparse MLA against the contract, in Pallas's interpreter, and its lowering for CUDA.

The interpreter runs the kernel's loops, barriers, masks and softmax; the row gather, written in PTX, it cannot run. Of
that, the layout and the widening of codes are checked here as arithmetic.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import InterpretGPUParams

from pallas_kernels.chips import chip
from pallas_kernels.kv_rows import dequantize_rows, quantize_rows
from pallas_kernels.sparse_mla import FirstN, Indices, Mask, Window, sparse_mla
from pallas_kernels.sparse_mla.gpu import sparse_mla_gpu
from pallas_kernels.sparse_mla.gpu_rows import piece_offset

pytestmark = pytest.mark.interpreter


FULL = bool(os.environ.get("DSV4_FULL_TESTS"))
SIZE, D, H, N, SCALE = 128, 256, 64, 100, 256**-0.5
PICKS = ("indices", "first", "mask", "none")


def case(T: int, kind: str, seed: int = 0, heads: int = H):
    """q, positions, window, entries, picks, sinks: a ring, rows nobody lists poisoned, one query without picks."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    slots, newest = SIZE + T + 3, 60 + T  # half a window in: some slots are empty
    held = newest - (newest - np.arange(slots)) % slots
    window = Window(normal(1, slots, D), jnp.asarray(held[None], jnp.int32), SIZE)
    positions, sinks = jnp.arange(60, 60 + T)[None], jnp.asarray(rng.standard_normal(heads), jnp.float32)
    q, entries = normal(1, T, heads, D), normal(1, N, D)
    if kind == "none":
        return q, positions, window, None, None, sinks
    if kind == "first":
        return q, positions, window, entries, FirstN(jnp.asarray([[70, 0][:T]])), sinks
    if kind == "mask":
        return q, positions, window, entries, Mask(jnp.asarray(rng.random((1, T, N)) < 0.3)), sinks
    index = np.stack([rng.permutation(80)[:70] for _ in range(T)])[None]
    index[:, -1:, 3:] = -1
    return q, positions, window, entries.at[:, 80:].set(jnp.nan), Indices(jnp.asarray(index, jnp.int32)), sinks


def run(*args, cores: int = 2, name: str = "H200", **options):
    small = dataclasses.replace(chip(name), cores=cores)  # fewer blocks for the interpreter to walk through
    out = sparse_mla_gpu(*args, scale=SCALE, chip=small, return_lse=True, interpret=InterpretGPUParams(), **options)
    return jax.block_until_ready(out)


def log_sum_exp(q, positions, window, entries, picks, sinks):
    """By the sink's share: one more sink of logit 0 takes weight exp(-lse)."""
    rows = jnp.concatenate([window.rows[0], entries[0]]).astype(jnp.float32)
    picked = jnp.zeros((q.shape[1], N), bool)
    for t, row in enumerate(np.asarray(picks.index[0])):
        picked = picked.at[t, row[row >= 0]].set(True)
    seen = jnp.concatenate([window.visible(positions)[0], picked], axis=1)
    logits = jnp.einsum("THD,SD->THS", q[0].astype(jnp.float32), jnp.nan_to_num(rows)) * SCALE
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    return jnp.logaddexp(jax.nn.logsumexp(logits, axis=-1), sinks)[None]


@pytest.mark.parametrize(
    ("kind", "cores", "name"),
    [(kind, 2, "H200") for kind in PICKS] + [("indices", 2, "B200")] + [("indices", 6, "H200")] * FULL,
)
def test_equals_the_reference(kind, cores, name):
    """6 cores for 2 queries: three blocks share each, and some of them have fewer tiles."""
    args = case(2, kind)
    want = sparse_mla(*args, scale=SCALE).astype(jnp.float32)
    out, lse = run(*args, cores=cores, name=name)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=0, atol=2**-7 * np.abs(want).max())
    if kind == "indices":
        np.testing.assert_allclose(lse, log_sum_exp(*args), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["indices", "first"] if FULL else ["indices"])
def test_rows_in_eight_bits(kind):
    q, positions, window, entries, picks, sinks = case(1, kind)
    coded = [quantize_rows(jnp.nan_to_num(x), 64) for x in (window.rows, entries)]
    wide = [dequantize_rows(x, jnp.bfloat16) for x in coded]
    args = lambda rows: (q, positions, dataclasses.replace(window, rows=rows[0]), rows[1], picks, sinks)
    want = sparse_mla(*args(wide), scale=SCALE).astype(jnp.float32)
    out, _ = run(*args(coded))
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=0, atol=2**-7 * np.abs(want).max())


@pytest.mark.parametrize("cores", [1, 2] if FULL else [1])
def test_nothing_to_see(cores):
    """Empty windows and no picks: zeros, and the sink alone in the log-sum-exp; without sinks minus infinity."""
    q, positions, window, entries, picks, _ = case(1, "indices")
    window = dataclasses.replace(window, positions=jnp.full_like(window.positions, -1))
    sinks = jnp.where(jnp.arange(H) % 2 == 0, 0.5, -jnp.inf)
    nothing = Indices(jnp.full_like(picks.index, -1))
    out, lse = run(q, positions, window, entries, nothing, sinks, cores=cores)
    np.testing.assert_array_equal(out, jnp.zeros_like(q))
    np.testing.assert_allclose(lse[0, 0], sinks, rtol=1e-5)


@pytest.mark.parametrize("name", ["A100", "v5e"])
def test_other_chips_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"sparse_mla_gpu: .*{name}.*H200, B200"):
        sparse_mla_gpu(*case(1, "none"), scale=SCALE, chip=chip(name))


def test_what_the_kernel_does_not_take_is_refused():
    q, *rest = case(1, "none")
    for bad, words in ((q[:, :, :40], "40 heads"), (q.astype(jnp.float32), "cast to bfloat16")):
        sinks = jnp.zeros(bad.shape[2])
        with pytest.raises(ValueError, match=words):
            sparse_mla_gpu(bad, *rest[:-1], sinks, scale=SCALE, chip=chip("H200"))


@pytest.mark.parametrize(("swizzle", "bits"), [(128, 7), (64, 3)])
def test_a_tile_lies_as_the_tensor_core_reads_it(swizzle, bits):
    """Atoms of 8 rows x swizzle bytes, row groups outermost; address bits from 4 on exchanged by those from 7 on."""
    rows, pieces = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    wide = swizzle // 16
    plain = np.arange(64 * 64).reshape(8, 64 // wide, 8, wide).transpose(0, 2, 1, 3).reshape(64, 64) * 16
    np.testing.assert_array_equal(piece_offset(rows, pieces, 64, swizzle), plain ^ (plain >> 7 & bits) << 4)


def test_codes_widen_by_moving_bits():
    """The kernel's arithmetic on each e4m3 code, done on integers: bf16 bits that are 2 ** -120 of its value."""
    codes = np.delete(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
    high = codes.astype(np.uint32) << 8
    bits = ((high & 0x7F00) >> 4 | high & 0x8000).astype(np.uint16)
    got = bits.view(jnp.bfloat16.dtype).astype(np.float64) * 2.0**120
    np.testing.assert_array_equal(got, codes.view(jnp.float8_e4m3fn.dtype).astype(np.float64))


@pytest.mark.parametrize("kind", PICKS)
@pytest.mark.parametrize(("B", "T", "heads", "name"), [(4, 1, 64, "H200"), (1, 300, 128, "H200"), (4, 1, 64, "B200")])
def test_lowers_for_cuda_without_a_device(B, T, heads, name, kind):
    entries = None if kind == "none" else jax.ShapeDtypeStruct((B, 4096, 512), jnp.bfloat16)
    sds = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
    picks = {"indices": Indices(sds(B, T, 512)), "first": FirstN(sds(B, T)), "mask": Mask(sds(B, T, 4096, dtype=bool))}
    S = 136 if T == 1 else T + SIZE - 1
    window = Window(sds(B, S, 512, dtype=jnp.bfloat16), sds(B, S), SIZE, is_band=T > 1)
    args = sds(B, T, heads, 512, dtype=jnp.bfloat16), sds(B, T), window, entries, picks.get(kind), sds(heads)
    call = jax.jit(lambda *args: sparse_mla_gpu(*args, scale=SCALE, chip=chip(name)))
    assert "mosaic_gpu" in call.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
