"""The GPU kernel of index top-k against the contract, in Pallas's interpreter, and its lowering for CUDA.

The interpreter runs the kernel's loops, copies, barriers and splits. What it cannot run is checked apart: the warps'
selection, the very functions that emit its code, on a machine of arrays; widening and its places, as arithmetic.
"""

from __future__ import annotations

import dataclasses
import os

import gpu_cases
import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from gpu_interpreter import InterpretGPUParams
from warps import LANES, Lanes

from pallas_kernels.chips import chip
from pallas_kernels.formats import decode_e2m1, decode_e8m0, unpack_fp4
from pallas_kernels.fp8_matmul.gpu_device import expand_text, factor_text
from pallas_kernels.index_rows import dequantize_index_rows, quantize_index_rows
from pallas_kernels.index_topk import gpu_select as select
from pallas_kernels.index_topk import pick_entries
from pallas_kernels.index_topk.gpu import index_topk_gpu
from pallas_kernels.index_topk.gpu_device import code_order, piece_place
from pallas_kernels.index_topk.tuning import gpu_config
from pallas_kernels.sparse_mla.gpu_rows import piece_offset

pytestmark = pytest.mark.interpreter


FULL = bool(os.environ.get("DSV4_FULL_TESTS"))
D = 128
PAST_THE_END = InterpretGPUParams(out_of_bounds_reads="uninitialized")  # a copy's last tile: poison, where a GPU has 0


def draw(B, T, N, *, H=8, integers=True, seed=0):
    """q, weights, keys and a `visible` that has N, 0 and what is between."""
    rng = np.random.default_rng((seed, B, T, N))
    values = lambda *s: rng.integers(-1, 2, s) if integers else rng.standard_normal(s)
    q, weights, keys = (jnp.asarray(values(*s), jnp.bfloat16) for s in ((B, T, H, D), (B, T, H), (B, N, D)))
    visible = rng.integers(0, N + 1, (B, T))
    visible[-1, -1] = 0
    visible[0, 0] = N
    return q, weights, keys, jnp.asarray(visible, jnp.int32)


def run(q, weights, keys, visible, top_k, *, name="H200", cores=2):
    small = dataclasses.replace(chip(name), cores=cores)  # fewer blocks for the interpreter to walk through
    call = jax.jit(lambda *args: index_topk_gpu(*args, top_k=top_k, chip=small, interpret=PAST_THE_END).index)
    return np.asarray(call(q, weights, keys, visible))


def sets(index) -> list[set[int]]:
    """Per query; indices must ascend and come before every -1."""
    rows = np.asarray(index).reshape(-1, index.shape[-1])
    for row in rows:
        used = row[: (row >= 0).sum()]
        assert (row[len(used) :] == -1).all() and (np.diff(used) > 0).all()
    return [set(row.tolist()) - {-1} for row in rows]


def wanted(q, weights, keys, visible, top_k) -> list[set[int]]:
    index = np.asarray(pick_entries(q, weights, dequantize_index_rows(keys, q.dtype), visible, top_k=top_k).index)
    return [set(row.tolist()) - {-1} for row in index.reshape(-1, index.shape[-1])]


# name: chip, cores, B, T, N, top_k, heads, integers (whose scores tie)
CASES = {
    "fewer entries than picks": ("H200", 2, 1, 2, 9, 12, 8, True),
    "N ends within a tile, a list fills up": ("H200", 1, 1, 1, 1003, 60, 8, True),
    "four splits of one query": ("H200", 4, 1, 1, 900, 40, 64, True),
    "three queries in a block of four, real scores": ("H200", 2, 2, 3, 500, 100, 8, False),
    "two blocks for five queries": ("H200", 1, 1, 5, 300, 33, 3, True),
    "Blackwell, two splits": ("B200", 2, 1, 2, 800, 64, 8, True),
}
MORE = {
    "a prompt's queries": ("H200", 2, 1, 17, 700, 64, 64, False),
    "Blackwell, one query, splits": ("B200", 5, 1, 1, 1500, 40, 64, False),
    "a batch": ("B200", 2, 5, 1, 400, 64, 8, True),
}


@pytest.mark.parametrize("name", [*CASES, *(MORE if FULL else ())])
def test_equals_the_reference(name):
    gpu, cores, B, T, N, top_k, H, integers = (CASES | MORE)[name]
    args = draw(B, T, N, H=H, integers=integers)
    got = run(*args, top_k, name=gpu, cores=cores)
    assert got.shape == (B, T, min(top_k, N)) and got.dtype == np.int32
    assert sets(got) == wanted(*args, top_k)


@pytest.mark.parametrize(("name", "N"), [("H200", 402), ("B200", 600)])
def test_keys_in_4_bits(name, N):
    """Scales of one entry's groups and of its neighbours are far apart; N is a multiple of 4 or not."""
    q, weights, keys, visible = draw(2, 2, N, integers=False)
    factor = 2.0 ** np.random.default_rng(1).integers(-12, 13, (2, N, D // 32)).repeat(32, -1)
    rows = quantize_index_rows(keys * factor)
    assert sets(run(q, weights, rows, visible, 50, name=name)) == wanted(q, weights, rows, visible, 50)


def test_entries_nobody_sees_may_hold_anything():
    q, weights, keys, _ = draw(2, 2, 500, integers=False)
    visible = jnp.asarray([[300, 299], [200, 7]], jnp.int32)
    want = wanted(q, weights, keys, visible, 50)
    assert sets(run(q, weights, keys.at[:, 300:].set(jnp.nan), visible, 50)) == want


def test_causal_rule_for_several_tokens():
    """Entry i is complete once token 4 i + 3 has been read: the query at position p sees floor((p + 1) / 4)."""
    q, weights, keys, _ = draw(1, 8, 300)
    visible = (1000 + jnp.arange(8)[None] + 1) // 4
    assert sets(run(q, weights, keys, visible, 64)) == wanted(q, weights, keys, visible, 64)


def test_nothing_is_scored_where_everything_is_picked():
    """Keys that are all NaN: no score of theirs can have been looked at. One split of two speaks for both."""
    q, weights, keys, _ = draw(1, 2, 600)
    visible = jnp.asarray([[64, 3]], jnp.int32)
    got = run(q, weights, jnp.full_like(keys, jnp.nan), visible, 64)
    assert sets(got) == [set(range(64)), {0, 1, 2}]


@pytest.mark.parametrize("name", ["A100", "v5e"])
def test_other_chips_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"index_topk_gpu: .*{name}.*H200, B200"):
        index_topk_gpu(*draw(1, 1, 50), top_k=5, chip=chip(name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": jnp.ones((2, 2, 9))}, "does not fit weights"),
        ({"keys": jnp.ones((2, 50, D), jnp.float32)}, "cast to bfloat16"),
        ({"q": jnp.ones((2, 2, 8, D))}, "cast to bfloat16"),
        ({"top_k": 1025}, "8 heads of 128 channels and top_k=1025; it takes 64 of 128 and 1024"),
        ({"q": jnp.ones((2, 2, 65, D), jnp.bfloat16), "weights": jnp.ones((2, 2, 65))}, "65 heads .* use the xla op"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    given = dict(zip(("q", "weights", "keys", "visible"), draw(2, 2, 50), strict=True))
    options = {"top_k": 10, "chip": chip("H200")} | given | change
    args = [options.pop(name) for name in given]
    with pytest.raises(ValueError, match=words):
        index_topk_gpu(*args, **options)


def best(scores, top_k: int) -> np.ndarray:
    """The entries of the `top_k` best, the lower index of a tie, ascending."""
    return np.sort(np.argsort(-scores.astype(np.float64), kind="stable")[:top_k])


def streams(rng, n: int) -> dict[str, np.ndarray]:
    return {
        "real": rng.standard_normal(n),
        "ties": rng.integers(-2, 3, n),
        "equal": np.zeros(n),
        "two zeros": np.where(rng.random(n) < 0.5, -0.0, 0.0),
        "ascending": np.arange(n) * 1e-3 - 1,
        "descending": -np.arange(n) * 1e30,
        "infinite": np.where(rng.random(n) < 0.1, np.inf, rng.standard_normal(n)),
        "subnormal": rng.standard_normal(n) * 1e-41,
    }


@pytest.mark.parametrize(
    ("n", "seen", "top_k", "capacity"), [(2000, 1990, 100, 256), (900, 900, 512, 1024), (300, 9, 12, 256)]
)
def test_a_warp_keeps_the_best_of_a_stream(n, seen, top_k, capacity):
    for name, scores in streams(np.random.default_rng(n), n).items():
        m, scores = Lanes(), scores.astype(np.float32)
        keys, index = np.zeros((2, capacity), np.int32)
        state, out = np.zeros(select.STATE, np.int32), np.zeros((2, top_k), np.int32)
        select.begin(m, state, seen)
        tiles = np.pad(scores, (0, -n % select.TILE), constant_values=np.nan).reshape(-1, select.TILE)
        for i, tile in enumerate(tiles.view(np.int32)):
            select.append(m, tile, keys, index, state, i * select.TILE, capacity=capacity, top_k=top_k)
        flags = m.word(0), m.word(0)
        select.finish(m, keys, index, state, *flags, *out, capacity=capacity, top_k=top_k)
        want = best(scores[:seen], top_k)
        missing = top_k - want.size
        np.testing.assert_array_equal(out[0], np.pad(want, (0, missing), constant_values=-1), err_msg=name)
        by_key = scores[want][np.argsort(out[1][: want.size], kind="stable")]  # held keys are in the scores' order
        assert (by_key[1:] >= by_key[:-1]).all() and (out[1][want.size :] == select.HIDDEN).all(), name


@pytest.mark.parametrize("first", [1, 0])
def test_a_list_may_say_that_all_are_picked(first):
    m, (keys, index), out = Lanes(), np.zeros((2, 256), np.int32), np.zeros((2, 70), np.int32)
    state = np.zeros(select.STATE, np.int32)
    select.begin(m, state, 40)
    select.finish(m, keys, index, state, m.word(1), m.word(first), *out, capacity=256, top_k=70)
    count = 40 * first
    np.testing.assert_array_equal(out[0], np.where(np.arange(70) < count, np.arange(70), -1))
    np.testing.assert_array_equal(out[1], np.where(np.arange(70) < count, 0, select.HIDDEN))


@pytest.mark.parametrize(
    ("warps", "lists", "top_k", "used"), [(16, 7, 512, 5), (16, 3, 100, 3), (2, 4, 33, 4), (4, 5, 64, 1)]
)
def test_a_block_merges_lists(warps, lists, top_k, used):
    """Each list has some of its places unused, at its end; only the first `used` lists count."""
    for name, scores in streams(np.random.default_rng(lists), lists * top_k).items():
        m, rounds = Lanes(warps), -(-lists * top_k // (warps * LANES))
        bits = scores.astype(np.float32).view(np.int32)
        keys = np.where(bits == select.HIDDEN, 0, np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)).astype(np.int32)
        index = np.arange(keys.size, dtype=np.int32) * 3
        empty = np.arange(keys.size) % top_k >= np.repeat(np.arange(lists) * 20 % top_k + 10, top_k)
        keys[empty], index[empty] = select.HIDDEN, -1
        out = np.full((2, top_k), 7, np.int32)
        select.merge(m, keys, index, np.int32(used * top_k), *out, rounds=rounds, top_k=top_k)
        places = np.flatnonzero(~empty[: used * top_k])
        want = places[best(scores[places].astype(np.float32), top_k)]
        pad = (0, top_k - want.size)
        np.testing.assert_array_equal(out[1], np.pad(index[want], pad, constant_values=-1), err_msg=name)
        np.testing.assert_array_equal(out[0], np.pad(keys[want], pad, constant_values=select.HIDDEN), err_msg=name)


def test_codes_widen_to_their_places():
    """The instructions on words of eight codes, and where a thread stores them, against the layout of a tile."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (select.TILE, D // 2), dtype=np.uint8)
    scales = rng.integers(1, 250, (select.TILE, 4), dtype=np.uint8)  # so that six times a scale is finite
    words, factors = codes.view(np.uint32), scales.view(np.uint32)[:, 0]
    memory = np.zeros(select.TILE * D // 2, np.uint32)
    row = np.arange(select.TILE)
    for n in range(D // 8):
        factor = ptx.run(factor_text(n // 4), factors)
        for pair in range(4):
            memory[piece_place(row, n) // 4 + pair] = ptx.run(expand_text(pair), words[:, n], factor)
    rows, pieces = np.meshgrid(row, np.arange(D // 8), indexing="ij")
    offsets = piece_offset(rows, pieces, D // 8)[..., None] // 2 + np.arange(8)
    got = memory.view(jnp.bfloat16.dtype)[offsets].reshape(select.TILE, D)
    values = np.asarray(decode_e2m1(unpack_fp4(jnp.asarray(codes)))) * np.repeat(np.asarray(decode_e8m0(scales)), 32, 1)
    np.testing.assert_array_equal(got.astype(np.float32), values[:, np.asarray(code_order(jnp.arange(D)))])


@pytest.mark.parametrize("name", ["H100", "B200"])
def test_blocks_fit_the_chip_and_lists_stay_shorter_than_the_keys(name):
    target = chip(name)
    for B, T, N, top_k in ((1, 1, 262144, 512), (1, 1, 262144, 1024), (64, 8, 65536, 1024), (1, 2048, 262144, 512)):
        config = gpu_config(B, T, N, top_k, target, is_coded=True)
        assert config.stages >= 2 and 4 * config.splits * top_k <= max(N, 4 * top_k)
        assert config.splits == 1 or B * -(-T // config.queries) * config.splits <= target.cores


@pytest.mark.parametrize("name", ["H200", "B200"])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(("T", "N"), [(1, 4096), (300, 4099)])
def test_lowers_for_cuda_without_a_device(name, coded, T, N):
    fn, args = gpu_cases.index_topk(chip(name), 2, T, N, 512, coded)
    assert "mosaic_gpu" in jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
