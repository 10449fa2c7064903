"""The indexer's selection for TPU, in the strict interpreter (uninitialised memory is poison), against the reference.

Sets must be equal, ties included. Integers make every score exact, so that ties abound; with real numbers the two sum
heads in another order, and the seeds are such that no score lies within rounding of the last one picked.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.chips import TPUS, chip
from pallas_kernels.index_rows import dequantize_index_rows, empty_index_rows, quantize_index_rows
from pallas_kernels.index_topk import index_topk_tpu, indices_from_bits_tpu, pick_entries
from pallas_kernels.index_topk.tpu_select import list_bits
from pallas_kernels.index_topk.tuning import default_config
from pallas_kernels.mask_bits import MaskBits, pack_mask, unpack_mask, words_for

pytestmark = pytest.mark.interpreter

FULL = bool(os.environ.get("DSV4_FULL_TESTS"))
D = 128
STRICT = pltpu.InterpretParams()
V6E = chip("v6e")


def draw(T, N, *, B=2, H=8, dtype=jnp.bfloat16, integers=True, seed=0):
    """q, weights, keys and a `visible` that has 0, N and everything between."""
    rng = np.random.default_rng((seed, T, N, H))
    values = lambda *s: rng.integers(-1, 2, s) if integers else rng.standard_normal(s)
    q, weights, keys = (jnp.asarray(values(*s), dtype) for s in ((B, T, H, D), (B, T, H), (B, N, D)))
    visible = rng.integers(0, N + 1, (B, T))
    visible[0, 0], visible[1, -1] = N, 0
    return q, weights, keys, jnp.asarray(visible, jnp.int32)


def sets(picks) -> list[set[int]]:
    """Per query; indices must be distinct, ascend and come before every -1."""
    if isinstance(picks, MaskBits):
        mask = np.asarray(unpack_mask(picks))
        return [set(np.flatnonzero(row).tolist()) for row in mask.reshape(-1, picks.size)]
    rows = np.asarray(picks.index).reshape(-1, picks.index.shape[-1])
    for row in rows:
        used = row[: (row >= 0).sum()]
        assert (row[len(used) :] == -1).all() and (np.diff(used) > 0).all()
    return [set(row.tolist()) - {-1} for row in rows]


def wanted(*args, top_k) -> list[set[int]]:
    index = np.asarray(pick_entries(*args, top_k=top_k).index)
    return [set(row.tolist()) - {-1} for row in index.reshape(-1, index.shape[-1])]


def check(args, top_k, **options):
    got = index_topk_tpu(*args, top_k=top_k, **({"chip": V6E, "interpret": STRICT} | options))
    assert sets(got) == wanted(*args, top_k=top_k)
    if not isinstance(got, MaskBits):
        assert got.index.shape == (*args[3].shape, min(top_k, args[2].shape[1])) and got.index.dtype == jnp.int32
    return got


SHAPES = [
    (1, 9, 12, 8),  # fewer entries than picks
    (1, 1024, 64, 64),
    (2, 3000, 130, 8),  # not a multiple of anything
    (8, 700, 100, 16),
    (3, 9000, 512, 8),  # two blocks of keys
    (1, 20000, 300, 8),  # slots look into two squares of entries
    (9, 200, 33, 8),  # bits from here on
    (20, 2500, 512, 8),
    (70, 5000, 64, 8),  # two tiles of queries, two groups of words
]


@pytest.mark.parametrize(("T", "N", "top_k", "H"), SHAPES)
def test_equals_the_reference(T, N, top_k, H):
    run = jax.jit(lambda *args: index_topk_tpu(*args, top_k=top_k, chip=V6E, interpret=STRICT))
    for integers in (True, False):
        args = draw(T, N, H=H, integers=integers)
        got = run(*args)
        assert sets(got) == wanted(*args, top_k=top_k)
        assert isinstance(got, MaskBits) == (T > 8)


@pytest.mark.parametrize(("T", "as_bits"), [(3, True), (20, False)])
def test_either_form_for_any_number_of_queries(T, as_bits):
    got = check(draw(T, 5000), 200, as_bits=as_bits)
    assert isinstance(got, MaskBits) == as_bits


def test_indices_from_bits_over_several_squares():
    rng = np.random.default_rng(0)
    mask = rng.random((2, 5, 70000)) < np.array([0, 1e-4, 3e-3, 8e-3, 1e-2])[:, None]
    mask[0, 3] = False
    mask[0, 3, 40000:40600] = True
    index = indices_from_bits_tpu(pack_mask(jnp.asarray(mask)), top_k=1000, chip=V6E, interpret=STRICT)
    for row, want in zip(np.asarray(index).reshape(10, -1), mask.reshape(10, -1), strict=True):
        want = np.flatnonzero(want)
        assert len(want) < 1000
        np.testing.assert_array_equal(row, np.pad(want, (0, 1000 - len(want)), constant_values=-1))


@pytest.mark.parametrize("T", [1, 8, 40] if FULL else [8, 40])
def test_causal_rule_for_several_tokens(T):
    """Entry i is complete once token 4 i + 3 has been read: the query at position p sees floor((p + 1) / 4)."""
    q, weights, keys, _ = draw(T, 700)
    position = jnp.asarray([[3], [2500]]) + jnp.arange(T)
    check((q, weights, keys, (position + 1) // 4), 64)


@pytest.mark.parametrize(("T", "weight"), [(2, -1.0), (16, 1.0)] + [(2, 1.0), (16, -1.0)] * FULL)
def test_scores_that_all_vanish_tie_and_the_first_entries_win(T, weight):
    q, keys = jnp.ones((2, T, 8, D), jnp.bfloat16), -jnp.ones((2, 1500, D), jnp.bfloat16)
    visible = jnp.full((2, T), 1400)
    got = check((q, jnp.full((2, T, 8), weight, jnp.bfloat16), keys, visible), 70)
    assert sets(got) == [set(range(70))] * (2 * T)


@pytest.mark.parametrize("T", [2, 16])
def test_all_scores_negative_or_huge(T):
    q, weights, keys, visible = draw(T, 1100, integers=False)
    run = jax.jit(lambda *args: index_topk_tpu(*args, top_k=90, chip=V6E, interpret=STRICT))
    for args in ((q, -jnp.abs(weights), keys, visible), (q * 1e15, weights * 1e4, keys * 1e15, visible)):
        assert sets(run(*args)) == wanted(*args, top_k=90)


@pytest.mark.parametrize("T", [2, 16])
def test_entries_nobody_sees_may_hold_anything(T):
    q, weights, keys, _ = draw(T, 1500, integers=False)
    visible = jnp.full((2, T), 600).at[1].set(0)
    want = wanted(q, weights, keys, visible, top_k=50)
    poisoned = keys.at[:, 600:].set(jnp.nan)
    got = index_topk_tpu(q, weights, poisoned, visible, top_k=50, chip=V6E, interpret=STRICT)
    assert sets(got) == want and want[-1] == set()


def test_most_of_a_long_pool_is_not_there_yet():
    q, weights, keys, _ = draw(1, 30000, integers=False)
    check((q, weights, keys, jnp.asarray([[700], [9000]])), 80)


@pytest.mark.parametrize("T", [2, 16] if FULL else [2])
def test_few_and_narrow_heads(T):
    q, weights, keys, visible = draw(T, 700)
    check((q[:, :, :3, :32], weights[:, :, :3], keys[:, :, :32], visible), 60)


@pytest.mark.parametrize("T", [2, 16] if FULL else [2])
def test_float32(T):
    check(draw(T, 700, dtype=jnp.float32, integers=False), 60)


@pytest.mark.parametrize(("T", "power_of_two"), [(2, True), (2, False), (16, True)])
def test_float8_codes_with_a_scale_per_entry(T, power_of_two):
    q, weights, keys, visible = draw(T, 2500, integers=False)
    rng = np.random.default_rng(1)
    scale = 2.0 ** rng.integers(-6, 7, keys.shape[:2]) if power_of_two else rng.uniform(0.5, 2, keys.shape[:2])
    codes, scale = keys.astype(jnp.float8_e4m3fn), jnp.asarray(scale, jnp.float32)
    wide = codes.astype(jnp.float32) * scale[..., None]
    got = index_topk_tpu(q, weights, codes, visible, top_k=100, scale=scale, chip=V6E, interpret=STRICT)
    assert sets(got) == wanted(q.astype(jnp.float32), weights, wide, visible, top_k=100)


@pytest.mark.parametrize(
    ("T", "dtype", "D"), [(1, "bfloat16", 128), (3, "float32", 128), (16, "bfloat16", 128), (2, "bfloat16", 64)]
)
def test_keys_in_4_bits(T, dtype, D):
    """Scales of one entry's groups and of its neighbours are far apart, so that one misplaced would show."""
    q, weights, keys, visible = draw(T, 2500, integers=False, dtype=jnp.dtype(dtype))
    q, keys = q[..., :D], keys[..., :D]
    factor = 2.0 ** np.random.default_rng(1).integers(-12, 13, (*keys.shape[:2], D // 32)).repeat(32, -1)
    rows = quantize_index_rows(keys * factor)
    wide = dequantize_index_rows(rows, q.dtype)
    got = index_topk_tpu(q, weights, rows, visible, top_k=100, chip=V6E, interpret=STRICT)
    assert sets(got) == wanted(q, weights, wide, visible, top_k=100)


@pytest.mark.parametrize("B", [8, 16])
def test_eight_sequences_are_searched_together(B):
    q, weights, keys, visible = draw(1, 1100, B=B, integers=False)
    rows = quantize_index_rows(keys)
    got = index_topk_tpu(q, weights, rows, visible, top_k=100, chip=V6E, interpret=STRICT)
    assert sets(got) == wanted(q, weights, dequantize_index_rows(rows, q.dtype), visible, top_k=100)


@pytest.mark.parametrize("T", [4, 30])
def test_same_picks_with_constant_trip_counts_and_other_blocks(T):
    config = dataclasses.replace(default_config(T, 2100, V6E), data_dependent=False, columns=128, key_block=1024)
    check(draw(T, 2100), 150, config=config)


@pytest.mark.parametrize("T", [2, 17])
def test_no_races(T):
    check(draw(T, 1100), 60, interpret=pltpu.InterpretParams(detect_races=True))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chip": chip("H100")}, "v5e, v5p, v6e, v7x"),
        ({"weights": jnp.ones((2, 2, 9))}, "does not fit weights"),
        ({"keys": jnp.ones((2, 50, D), jnp.float32)}, "must be bfloat16 as the queries"),
        ({"keys": jnp.ones((2, 50, D), jnp.float8_e4m3fn)}, "codes with a scale"),
        ({"scale": jnp.ones((2, 50))}, "codes with a scale"),
        ({"top_k": 0}, "top_k=0 positive"),
        ({"q": jnp.ones((2, 2, 8, 256), jnp.bfloat16), "keys": jnp.ones((2, 50, 256), jnp.bfloat16)}, "use the xla op"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    given = dict(zip(("q", "weights", "keys", "visible"), draw(2, 50), strict=True))
    options = {"top_k": 10, "chip": V6E} | given | change
    args = [options.pop(name) for name in given]
    with pytest.raises(ValueError, match=words):
        index_topk_tpu(*args, **options)


def test_scores_beyond_vmem_are_refused():
    q, weights, _, _ = draw(16, 9)
    keys = jax.ShapeDtypeStruct((2, 1 << 21, D), jnp.bfloat16)
    visible = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    with pytest.raises(ValueError, match="bytes of the .* of VMEM on v7x"):
        jax.eval_shape(lambda k, v: index_topk_tpu(q, weights, k, v, top_k=512, chip=chip("v7x")).words, keys, visible)


@pytest.mark.parametrize("size", [1, 128, 4095, 4096, 9000])
def test_mask_bits_round_trip(size):
    mask = np.random.default_rng(size).random((2, 3, size)) < 0.3
    bits = pack_mask(jnp.asarray(mask))
    assert bits.words.shape == (2, 3, words_for(size)) and bits.words.dtype == jnp.int32
    np.testing.assert_array_equal(unpack_mask(bits), mask)
    words = np.asarray(bits.words).view(np.uint32)
    for i in (0, size // 2, size - 1):  # the layout as documented
        word, bit = i // 4096 * 128 + i % 128, i // 128 % 32
        np.testing.assert_array_equal((words[..., word] >> bit & 1).astype(bool), mask[..., i])


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_lists_of_bits(groups):
    """Several queries share a product; each list is that of its query alone."""
    rng, slots, entries = np.random.default_rng(groups), 512, groups * 4096
    picks = [rng.permutation(entries)[:n] for n in (512, 0, 1, 300)] + [np.arange(512), entries - 1 - np.arange(512)]
    words = np.zeros((len(picks), groups, 1, 128), np.uint32)
    for query, picked in enumerate(picks):
        for i in picked:
            words[query, i // 4096, 0, i % 128] |= np.uint32(1 << i // 128 % 32)
    listed = list_bits([[jnp.asarray(word.view(np.int32)) for word in query] for query in words], slots)
    for picked, found in zip(picks, listed, strict=True):
        np.testing.assert_array_equal(found[0], np.pad(np.sort(picked), (0, slots - len(picked)), constant_values=-1))


def make_case(target, T: int, N: int, top_k: int, held: str = "bf16", B: int = 4):
    """The kernel at the published 64 heads of 128, for `aot`."""
    H, array = 64, jax.ShapeDtypeStruct
    keys = array((B, N, D), jnp.float8_e4m3fn if held == "fp8" else jnp.bfloat16)
    keys = jax.eval_shape(lambda: empty_index_rows((B, N, D))) if held == "fp4" else keys
    args = [array((B, T, H, D), jnp.bfloat16), array((B, T, H), jnp.bfloat16), keys, array((B, T), jnp.int32)]
    args += [array((B, N), jnp.float32)] if held == "fp8" else []

    def run(q, weights, keys, visible, scale=None):
        return index_topk_tpu(q, weights, keys, visible, top_k=top_k, scale=scale, chip=target)

    return run, args


AOT_CASES = [
    {"T": T, "N": N, "top_k": top_k, "held": held}
    for T, N, top_k, held in [
        (1, 262144, 512, "fp4"), (8, 262144, 1024, "bf16"), (8, 8192, 512, "fp4"), (1, 16384, 512, "fp8"),
        (512, 262144, 1024, "bf16"), (4096, 16384, 1024, "fp8"), (2048, 32768, 512, "fp4"),
        *[(4096, 1024, 512, "bf16")] * FULL,
    ]
]  # fmt: skip


@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("name", TPUS)
def test_compiles_ahead_of_time(name):
    target = f"{__file__}:make_case"
    for report in aot.run_cases([aot.Case(target, case) for case in AOT_CASES], name):
        assert "error" not in report, report
        assert report["custom_calls"].get("tpu_custom_call") == 1, report
