"""Sparse MLA for TPU, in the strict interpreter (uninitialised memory is NaN), against the reference."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import chip
from pallas_kernels.kv_rows import Fp8Rows, dequantize_rows, quantize_rows
from pallas_kernels.mask_bits import pack_mask
from pallas_kernels.sparse_mla import FirstN, Indices, Mask, Window, sparse_mla
from pallas_kernels.sparse_mla import tpu as kernel
from pallas_kernels.sparse_mla.tpu_attend import widen
from pallas_kernels.sparse_mla.tuning import TpuConfig, default_config, gather_is_faster

pytestmark = pytest.mark.interpreter

FULL = bool(os.environ.get("DSV4_FULL_TESTS"))
D, R, SCALE = 128, 16, 128**-0.5
STRICT = pltpu.InterpretParams()
TOLERANCE = {jnp.bfloat16: 2**-7, jnp.float32: 3e-6}  # of the largest value
LSE_TOLERANCE = 2e-6  # relative


def inputs(T, H, kind, *, N=300, B=2, band=None, size=128, dtype=jnp.bfloat16, fp8=False, seed=0):
    rng = np.random.default_rng((seed, T, H, N))
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    hold = lambda rows: quantize_rows(rows, R) if fp8 else rows
    start = rng.integers(0, 200, (B, 1))
    band = T > 16 if band is None else band
    if band:
        held = start - (size - 1) + np.arange(T + size - 1)
    else:  # a ring that has just been written
        last, slots = start + T - 1, T + size - 1
        held = last - (last - np.arange(slots)) % slots
    window = Window(hold(normal(B, held.shape[1], D)), jnp.asarray(held, jnp.int32), size, is_band=band)
    index = np.argsort(rng.random((B, T, N)), axis=-1)[..., :40]
    picks = {
        "window only": lambda: None,
        "first": lambda: FirstN(jnp.asarray(rng.integers(0, N + 1, (B, T)), jnp.int32)),
        "none": lambda: FirstN(jnp.zeros((B, T), jnp.int32)),
        "all": lambda: FirstN(jnp.full((B, T), N, jnp.int32)),
        "mask": lambda: Mask(jnp.asarray(rng.random((B, T, N)) < 0.3)),
        "bits": lambda: pack_mask(jnp.asarray(rng.random((B, T, N)) < 0.3)),
        "few": lambda: Mask(jnp.asarray(rng.random((B, T, N)) < 1 / N)),
        "indices": lambda: Indices(jnp.asarray(np.where(rng.random(index.shape) < 0.3, -1, index), jnp.int32)),
        "all -1": lambda: Indices(jnp.full(index.shape, -1, jnp.int32)),
    }[kind]()
    entries = None if picks is None else hold(normal(B, N, D))
    positions = jnp.asarray(start + np.arange(T), jnp.int32)
    return normal(B, T, H, D), positions, window, entries, picks, jnp.asarray(rng.standard_normal(H), jnp.float32)


def check(args, *, chip_name="v6e", want_args=None, **options):
    """Kernel and reference agree on output and log-sum-exp; -> the output."""
    got, got_lse = jax.block_until_ready(
        kernel.sparse_mla_tpu(*args, scale=SCALE, chip=chip(chip_name), return_lse=True, interpret=STRICT, **options)
    )
    want, want_lse = sparse_mla(*(want_args or args), scale=SCALE, return_lse=True)
    dtype = args[0].dtype.type
    assert got.dtype == want.dtype and got_lse.dtype == jnp.float32
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * np.abs(want).max())
    np.testing.assert_allclose(got_lse, want_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)
    return got


# T, heads, kind, options
CASES = [
    (1, 8, "first", {"B": 4}),
    (1, 64, "window only", {"fp8": True}),
    (1, 128, "indices", {"N": 1100, "B": 2}),  # three blocks, the last one short
    (3, 12, "first", {"B": 3, "N": 700}),  # heads padded to 16, sequences that run out of blocks before others
    (4, 64, "mask", {"N": 1100}),
    (8, 8, "few", {"N": 1700}),  # whole blocks skipped
    (5, 8, "all -1", {"N": 1100}),
    (9, 8, "first", {"band": True, "size": 16}),
    (35, 8, "indices", {"N": 700, "fp8": True, "B": 1}),
    (70, 64, "bits", {}),
    (3, 16, "bits", {"N": 4500, "B": 1}),  # two groups of words
    (1, 64, "window only", {}),
    (1, 8, "first", {"N": 1700, "B": 4}),  # one step, which copies all blocks itself; some sequences end early
    (1, 8, "few", {"N": 1100, "B": 8}),  # two steps, whose first blocks are brought
]
MORE = [  # with DSV4_FULL_TESTS=1
    (2, 16, "first", {"N": 700, "fp8": True}),  # two sequences side by side
    (1, 64, "all", {"N": 40}),
    (8, 16, "none", {"N": 1100}),
    (40, 16, "first", {"N": 700}),
    (20, 64, "mask", {"fp8": True}),
    (33, 128, "first", {"N": 20, "B": 1}),
    (150, 8, "window only", {"size": 16}),
    (17, 32, "all -1", {}),
    (130, 8, "indices", {"N": 1100, "B": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("T", "heads", "kind", "options"), CASES + MORE * FULL)
def test_equals_the_reference(T, heads, kind, options, monkeypatch):
    monkeypatch.setattr(kernel, "gather_is_faster", lambda *_: False)
    check(inputs(T, heads, kind, **options))


@pytest.mark.parametrize(
    ("T", "heads", "kind", "N", "fp8"),
    [(1, 64, "indices", 640, False), (4, 8, "indices", 300, True), (40, 16, "indices", 640, False),
     (5, 16, "all -1", 640, FULL)])  # fmt: skip
def test_gathered_rows_equal_the_reference(T, heads, kind, N, fp8, monkeypatch):
    monkeypatch.setattr(kernel, "gather_is_faster", lambda *_: True)
    monkeypatch.setattr(kernel, "GATHER_BYTES", 1 << 18)  # 40 queries go in several chunks, the last one padded
    check(inputs(T, heads, kind, N=N, fp8=fp8))


@pytest.mark.parametrize(("T", "kind"), [(2, "indices"), (20, "first")] + [(2, "first"), (20, "indices")] * FULL)
def test_float32(T, kind):
    check(inputs(T, 8, kind, dtype=jnp.float32, N=200))


def test_wide_queries_read_8_bit_rows_exactly():
    q, *rest = inputs(3, 8, "first", fp8=True)
    check((q.astype(jnp.float32), *rest))


@pytest.mark.parametrize("gather", [False, True], ids=["mask", "gather"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("T", [1, 20] if FULL else [1])
def test_entries_nobody_picks_may_hold_nan(T, fp8, gather, monkeypatch):
    monkeypatch.setattr(kernel, "gather_is_faster", lambda *_: gather)
    q, positions, window, entries, picks, sinks = inputs(T, 8, "indices", N=1100, fp8=fp8)
    picks = Indices(picks.index.at[0, 0].set(-1).at[:, :, 0].set(-1))  # one query picks nothing at all
    picked = np.zeros((*entries.shape[:2], 1), bool)
    for b in range(len(picked)):
        picked[b, np.unique(np.asarray(picks.index[b]))[1:]] = True
    clean = (q, positions, window, entries, picks, sinks)
    spoil = lambda x, bad: jnp.where(jnp.asarray(picked), x, bad)
    if fp8:
        poison = Fp8Rows(spoil(entries.codes, jnp.nan), spoil(entries.scales, 255), spoil(entries.rope, jnp.inf))
    else:
        poison = spoil(entries, jnp.nan)
    check((q, positions, window, poison, picks, sinks), want_args=clean)


def test_picks_listed_twice_count_once_under_a_mask(monkeypatch):
    monkeypatch.setattr(kernel, "gather_is_faster", lambda *_: False)
    q, positions, window, entries, picks, sinks = inputs(2, 8, "indices")
    twice = Indices(jnp.concatenate([picks.index, picks.index], axis=2))
    check((q, positions, window, entries, twice, sinks), want_args=(q, positions, window, entries, picks, sinks))


@pytest.mark.parametrize(
    ("kind", "sink"), [("none", -np.inf), ("all -1", 80.0)] + [("none", 0.0), ("all -1", -np.inf)] * FULL
)
def test_nothing_visible_gives_zeros(kind, sink):
    q, positions, window, entries, picks, _ = inputs(3, 8, kind)
    window = dataclasses.replace(window, positions=jnp.full_like(window.positions, -1))
    out = check((q, positions, window, entries, picks, jnp.full(8, sink)))
    assert (out == 0).all()


def test_scores_far_apart():
    """Later blocks hold far larger scores than earlier ones, and the other way round."""
    for order in (1, -1):
        q, positions, window, entries, _, sinks = inputs(1, 8, "first", N=1536, B=1)
        entries = entries * jnp.linspace(0.01, 20, 1536, dtype=jnp.bfloat16)[::order, None]
        check((q, positions, window, entries, FirstN(jnp.full((1, 1), 1536, jnp.int32)), sinks))


@pytest.mark.parametrize("chip_name", ["v5e", "v5p", "v7x"] if FULL else ["v5p"])
@pytest.mark.parametrize(("T", "B"), [(1, 3), (40, 1)] if FULL else [(1, 3)])
def test_other_chips(chip_name, T, B):
    check(inputs(T, 16, "first", B=B), chip_name=chip_name)  # v5p: two cores and an odd number of tiles


@pytest.mark.parametrize(
    "config", [TpuConfig(1, 16, 256, 64)] + [TpuConfig(1, 8, 128, 64), TpuConfig(1, 64, 128, 512)] * FULL, ids=str
)
def test_block_sizes_do_not_matter(config):
    check(inputs(70, 8, "mask", N=500), config=config)


def test_no_races():
    args = inputs(1, 8, "first", N=1100, B=2)
    run = lambda: kernel.sparse_mla_tpu(
        *args, scale=SCALE, chip=chip("v6e"), config=TpuConfig(2, 1, 256, 8),
        interpret=pltpu.InterpretParams(detect_races=True),
    )  # fmt: skip
    jax.block_until_ready(run())
    assert not interpret_pallas_call.races.races_found


def test_what_cannot_run_is_refused():
    args = inputs(1, 8, "first")
    with pytest.raises(ValueError, match="v5e, v5p, v6e, v7x"):
        kernel.sparse_mla_tpu(*args, scale=SCALE, chip=chip("H100"))
    with pytest.raises(ValueError, match="float16; the TPU kernel takes bfloat16 or float32"):
        kernel.sparse_mla_tpu(args[0].astype(jnp.float16), *args[1:], scale=SCALE, chip=chip("v6e"))
    long = Window(jnp.zeros((2, 5000, D)), jnp.zeros((2, 5000), jnp.int32), 128)
    with pytest.raises(ValueError, match="window of 5000 rows is too long"):
        kernel.sparse_mla_tpu(*args[:2], long, *args[3:], scale=SCALE, chip=chip("v6e"))
    with pytest.raises(ValueError, match="does not fit entries"):
        kernel.sparse_mla_tpu(*args[:3], None, *args[4:], scale=SCALE, chip=chip("v6e"))


def test_every_shape_has_a_config_that_fits_it():
    for heads in (8, 16, 24, 64, 128):
        for T in (1, 3, 16, 17, 4096):
            for B in (1, 2, 3, 8):
                config = default_config(chip("v6e"), B, T, heads, 5000)
                assert B % config.sequences == 0 and (config.tokens * heads) % config.rows == 0
                assert config.rows % heads == 0 and (T <= 16 or config.tokens % 8 == 0)


def test_a_gather_is_for_long_pools():
    for name in ("v5e", "v5p", "v6e", "v7x"):
        assert not gather_is_faster(chip(name), 1, 64, 512, 1024, 512)
        assert gather_is_faster(chip(name), 1, 64, 512, 65536, 512)


@pytest.mark.parametrize("native", [False, True])
def test_rows_widened_in_the_kernel_are_the_rows(native):
    rows = jax.tree.map(lambda x: x[0], inputs(1, 8, "first", fp8=True)[3])
    wide = widen([rows.codes, rows.scales, rows.rope], jnp.float32, native)
    np.testing.assert_array_equal(wide, dequantize_rows(rows, jnp.float32))
