"""What a warpgroup does for index top-k that Pallas's interpreter does not know, and its stand-in in jnp."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.chips import MOSAIC_GPUS, Chip, require
from pallas_kernels.fp8_matmul.gpu_device import expand_text, factor_text
from pallas_kernels.index_rows import Fp4Rows, dequantize_index_rows
from pallas_kernels.index_topk import gpu_select as select
from pallas_kernels.index_topk.gpu_select import COUNT, HIDDEN, LEAST, TILE, VISIBLE
from pallas_kernels.index_topk.gpu_warps import Memory, Warps, Word
from pallas_kernels.sparse_mla.gpu_rows import tiled

COMPUTE = 2  # warpgroups that score
MERGING = 4  # warpgroups of a block that merges lists
HEADS, DIM = 64, 128
CODE_ROW = 68  # bytes of a row of `Fp4Rows`
SWIZZLE = 128
SCALAR = plgpu.Layout.WG_SPLAT(())
REF, WIDE = plgpu.RefType(), plgpu.RefType(tiled(SWIZZLE))


def device_of(chip: Chip, op: str, interpret: Any) -> Device:
    """What `chip` multiplies with, or its stand-in; ValueError if there is neither."""
    require(chip, op, platform="cuda", generations=MOSAIC_GPUS)
    device = Device() if chip.generation == 90 else Blackwell()
    return Interpreted(device) if interpret else device


def code_order(x):
    """Channels [..., 128] in the order of `Device.widen_codes`: of the eight in a word, n and n + 4 are a pair."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2, 4), -1, -2).reshape(x.shape)


class Device:
    """Layouts and inline code for sm_90a (wgmma): each warpgroup scores 64 entries of a tile for all queries.

    registers: of a thread that scores, fetches and selects (the four warpgroups together have 512).
    """

    registers = 120, 72, 200

    def scratch(self) -> list:
        """What `score` wants besides."""
        return []

    def compute(self, warpgroup, body, scratch) -> None:
        """Run body(device, share) in each warpgroup that scores."""
        body(self, warpgroup)

    def score(self, share, tile, q, weights, scores) -> None:
        """scores[n, i] = sum_h weights[n, h] relu(q_nh . key_i), for this warpgroup's share of n and i.

        tile bf16 [128, 128]; q bf16 [queries * 64, 128]; weights fp32 [queries, 64]; scores fp32 [queries, 128].
        """
        rows, queries = pl.ds(share * HEADS, HEADS), weights.shape[0]
        layout = plgpu.Layout.WGMMA.reduce(0)
        for first in range(0, queries, 2):
            both = min(2, queries - first)

            def multiply(acc, first=first, both=both):
                plgpu.wgmma(acc, tile.at[rows], q.at[pl.ds(first * HEADS, both * HEADS)].transpose((1, 0)))
                return acc[...]

            product = pl.run_scoped(multiply, plgpu.ACC((HEADS, both * HEADS), jnp.float32))
            for n in range(both):
                factors = plgpu.load(weights.at[first + n], (), layout=layout, optimized=False)
                part = jnp.maximum(product[:, n * HEADS : (n + 1) * HEADS], 0.0)
                part = part * jax.lax.broadcast_in_dim(factors, part.shape, [1])
                scores[first + n, rows] = part.sum(axis=1)

    def load_wide(self, keys, start, tile, full) -> None:
        """Start to copy keys start .. start + 127 of bf16 [N, 128]; zeros past the last."""
        plgpu.copy_gmem_to_smem(keys.at[pl.ds(start, TILE)], tile, full)

    def fetch_codes(self, keys, start, end, slot) -> None:
        """Start to copy codes of keys start .. start + 127 below `end`, of uint8 [N, 68], into `slot`."""
        copy = plgpu.inline_mgpu(arg_types=(REF, SCALAR, SCALAR, REF))
        copy(_fetch_codes)(keys, start, end, slot)

    def wait_for_codes(self, behind: int) -> None:
        """Wait for all copies but the last `behind`, of all threads of this warpgroup."""
        plgpu.inline_mgpu()(functools.partial(_wait_for_codes, behind=behind))()

    def widen_codes(self, slot, tile) -> None:
        """Codes in shared memory -> bf16 keys, their channels in `code_order`."""
        plgpu.inline_mgpu(arg_types=(REF, WIDE))(_widen_codes)(slot, tile)

    def begin(self, state, visible) -> None:
        """Empty lists for as many queries, whose visible entries are int32 [queries]."""

        def run(m, state, visible):
            select.begin(m, state, m.load(visible, 0))

        self._by_warps(run, state, visible)

    def append(self, scores, lists, start, top_k: int) -> None:
        """Add a tile's scores, of the entries from `start` on, to the lists: keys, index and state of each query."""

        def run(m, scores, keys, index, state, start):
            select.append(m, scores, keys, index, state, start, capacity=capacity, top_k=top_k)

        capacity = lists[0].shape[1]
        self._by_warps(run, scores, *lists, scalars=[start])

    def finish(self, lists, out, everything, first, top_k: int) -> None:
        """Write the lists' best indices, and their keys if `out` has room for them, to int32 [queries, top_k]."""

        def run(m, keys, index, state, *rest):
            *out, everything, first = rest
            select.finish(m, keys, index, state, everything, first, *out, capacity=capacity, top_k=top_k)

        capacity = lists[0].shape[1]
        self._by_warps(run, *lists, *out, scalars=[everything, first])

    def _by_warps(self, run, *refs, scalars=()) -> None:
        """run(machine, memories.., scalars..) in a warp for each query: its line of each reference is a memory."""
        queries = refs[0].shape[0]

        @plgpu.inline_mgpu(arg_types=(REF,) * len(refs) + (SCALAR,) * len(scalars))
        def inline(_, *args):
            m = Warps()
            memories = [Memory.of(ref, m.warp) for ref in args[: len(refs)]]
            words = [Word(x.registers.item()) for x in args[len(refs) :]]
            m.when(m.warp < queries, lambda: run(m, *memories, *words))

        inline(*refs, *scalars)

    def merge(self, held, length, exchange, out, rounds: int, top_k: int) -> None:
        """See `gpu_select.merge`: keys and index of `held` to those of `out`, by all warps of the block."""

        @plgpu.inline_mgpu(arg_types=(REF, REF, SCALAR, REF, REF, REF))
        def inline(_, keys, index, length, exchange, *out):
            m = Warps(MERGING * 4, Memory.of(exchange))
            memories = Memory.of(keys), Memory.of(index), Word(length.registers.item()), *map(Memory.of, out)
            select.merge(m, *memories, rounds=rounds, top_k=top_k)

        inline(*held, length, exchange, *out)


class Blackwell(Device):
    """For sm_100a (tcgen05): a warpgroup scores all 128 entries of a tile, each a thread's, for every second query."""

    part = 32  # heads that are loaded from tensor memory at a time

    def __init__(self, half: int = 0, product=None, done=None, read=None):
        self.half, self.product, self.done, self.read = half, product, done, read

    def scratch(self):
        barrier = plgpu.Barrier(num_barriers=COMPUTE, orders_tensor_core=True)
        return [barrier, barrier, *[plgpu.TMEM((TILE, HEADS), jnp.float32)] * COMPUTE]

    def compute(self, warpgroup, body, scratch):
        done, read, *products = scratch
        for half in range(COMPUTE):  # tensor memory is chosen when the kernel is compiled
            device = Blackwell(half, products[half], done.at[half], read.at[half])
            pl.when(warpgroup == half)(functools.partial(body, device, half))

    def score(self, share, tile, q, weights, scores):
        layout = plgpu.Layout.TCGEN05
        for n in range(self.half, weights.shape[0], COMPUTE):
            here = q.at[pl.ds(n * HEADS, HEADS)].transpose((1, 0))
            plgpu.tcgen05_mma(self.product, tile, here, self.done, accumulate=False)
            plgpu.barrier_wait(self.done)
            total = None
            for h in range(0, HEADS, self.part):
                heads = pl.ds(h, self.part)
                part = plgpu.async_load_tmem(self.product.at[:, heads], layout=layout)
                plgpu.wait_load_tmem()
                factors = plgpu.load(weights.at[n, heads], (), layout=layout.reduce(0), optimized=False)
                factors = plgpu.layout_cast(jax.lax.broadcast_in_dim(factors, part.shape, [1]), layout)
                some = (jnp.maximum(part, 0.0) * factors).sum(axis=1)
                total = some if total is None else total + some
            scores[n] = total
            plgpu.barrier_arrive(self.read)  # all four warps have read before one of them starts the next product
            plgpu.barrier_wait(self.read)


class Interpreted(Device):
    """The same in jnp; loops, copies, barriers and the order of all steps stay the kernel's own."""

    def __init__(self, device: Device):
        self.registers = device.registers
        self.by_query = isinstance(device, Blackwell)

    def score(self, share, tile, q, weights, scores):
        dots = jnp.dot(q[...].astype(jnp.float32), tile[...].astype(jnp.float32).T, precision="highest")
        dots = jax.nn.relu(dots).reshape(*weights.shape, TILE)
        value = jnp.sum(dots * weights[...][..., None], axis=1)
        if self.by_query:
            for n in range(weights.shape[0]):

                @pl.when(share == n % COMPUTE)
                def _store(n=n):
                    scores[n] = value[n]

            return
        rows = pl.ds(share * HEADS, HEADS)
        scores[:, rows] = jax.lax.dynamic_slice_in_dim(value, share * HEADS, HEADS, 1)

    def fetch_codes(self, keys, start, end, slot):
        codes = keys[...]
        codes = jnp.pad(codes, ((0, TILE), (0, 0)))
        some = jax.lax.dynamic_slice_in_dim(codes, start, TILE)
        inside = start + jnp.arange(TILE) < jnp.minimum(end, keys.shape[0])
        slot[...] = jnp.where(inside[:, None], some, 0).reshape(-1)

    def wait_for_codes(self, behind):
        pass

    def widen_codes(self, slot, tile):
        rows = Fp4Rows(slot[...].reshape(TILE, CODE_ROW), DIM)
        tile[...] = code_order(dequantize_index_rows(rows, jnp.bfloat16))

    def begin(self, state, visible):
        nothing = jnp.zeros(visible.shape, jnp.int32)
        state[...] = jnp.stack([nothing, nothing + HIDDEN, visible[...], nothing], axis=-1)

    def append(self, scores, lists, start, top_k):
        add = jax.vmap(functools.partial(_append, start=start, top_k=top_k))
        for ref, value in zip(lists, add(scores[...], *(x[...] for x in lists)), strict=True):
            ref[...] = value

    def finish(self, lists, out, everything, first, top_k):
        keys, index, state = jax.vmap(functools.partial(_prune, top_k=top_k))(*(x[...] for x in lists))
        place = jnp.arange(top_k)
        count = jnp.where(everything == 1, jnp.where(first == 1, state[:, VISIBLE], 0), state[:, COUNT])[:, None]
        found = jnp.where(everything == 1, place, index[:, :top_k]), jnp.where(everything == 1, 0, keys[:, :top_k])
        for ref, value, none in zip(out, found, (-1, HIDDEN), strict=False):
            ref[...] = jnp.where(place < count, value, none)

    def merge(self, held, length, exchange, out, rounds, top_k):
        @pl.when(jax.lax.axis_index("warpgroup") == 0)
        def _merge():
            keys, index = (x[...] for x in held)
            keys = jnp.where(jnp.arange(keys.size) < length, keys, HIDDEN)
            best, place = jax.lax.top_k(keys, top_k)
            place = jnp.sort(jnp.where(best == HIDDEN, keys.size, place))
            for ref, x, none in zip(out, (keys, index), (HIDDEN, -1), strict=True):
                ref[...] = jnp.where(place < keys.size, x[jnp.minimum(place, keys.size - 1)], none)


def _prune(keys, index, state, top_k):
    """A list whose `top_k` best are left, if it has more; in the order of its entries."""
    size, words = keys.size, jnp.arange(select.STATE)
    held = jnp.where(jnp.arange(size) < state[COUNT], keys, HIDDEN)
    best, place = jax.lax.top_k(held, min(top_k, size))
    place = jnp.pad(jnp.sort(place), (0, size - place.size))
    is_over = state[COUNT] > top_k
    cut = jnp.where(words == COUNT, top_k, jnp.where(words == LEAST, best[-1], state))
    pruned = held[place], index[place], cut
    return tuple(jnp.where(is_over, new, x) for new, x in zip(pruned, (keys, index, state), strict=True))


def _append(scores, keys, index, state, start, top_k):
    """`gpu_select.append` of one list."""
    size = keys.size
    pruned = _prune(keys, index, state, top_k)
    is_full = state[COUNT] > size - TILE
    keys, index, state = (jnp.where(is_full, new, x) for new, x in zip(pruned, (keys, index, state), strict=True))
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    key = jnp.where(scores == 0, 0, jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    entry = start + jnp.arange(TILE, dtype=jnp.int32)
    wanted = (key > state[LEAST]) & (entry < state[VISIBLE])
    used = jnp.concatenate([jnp.arange(size) < state[COUNT], wanted])
    order = jnp.argsort(~used)[:size]  # it keeps the order of equals
    keys, index = (jnp.concatenate(pair)[order] for pair in ((keys, key), (index, entry)))
    more = jnp.where(jnp.arange(select.STATE) == COUNT, wanted.sum(dtype=jnp.int32), 0)
    return keys, index, state + more


def _i32(value):
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def _asm(result, operands, text: str, constraints: str):
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=True, asm_dialect=0)


def _thread():
    return Word(mgpu.utils.thread_idx()) & 127


def _fetch_codes(_, keys, start, end, slot):
    """Pieces of 16 bytes in turn, as the rows lie; of 4 where the arrays of a batch start at no multiple of 16."""
    size = 16 if ir.MemRefType(keys.type).shape[0] % 4 == 0 else 4
    start, end = (Word(x.registers.item()) for x in (start, end))
    m, source, target = Warps(), Memory.of(keys), Memory.of(slot)
    source = Memory(source.address(start * (CODE_ROW // 4)), source.is_shared)
    left = (end + start * -1) * CODE_ROW  # bytes that there are
    cache = "cg" if size == 16 else "ca"
    for first in range(0, TILE * CODE_ROW, size * 128):
        at = _thread() * size + first
        begin = source.address(m.pick(at < left, at >> 2, 0))
        wanted, room = m.pick(at < left, size, 0), m.pick(at < TILE * CODE_ROW, 1, 0)
        text = f"""{{ .reg .pred p; setp.ne.b32 p, $3, 0;
          @p cp.async.{cache}.shared.global [$0], [$1], {size}, $2; }}"""
        _asm(None, [target.address(at >> 2), begin, wanted.value, room.value], text, "r,l,r,r")
    _asm(None, [], "cp.async.commit_group;", "")


def _wait_for_codes(_, *, behind: int):
    _asm(None, [], f"cp.async.wait_group {behind};", "")
    mgpu.utils.warpgroup_barrier()


def _widen_codes(_, slot, tile):
    """A thread widens a row: its words lie 17 apart, hence in banks of their own."""
    row, m, target = _thread(), Warps(), Memory.of(tile)
    words = Memory(Memory.of(slot).address(row * (CODE_ROW // 4)), True)
    scales = m.load(words, DIM // 8)
    for n in range(DIM // 8):
        if n % 4 == 0:
            factor = _asm(_i32(0).type, [scales.value], factor_text(n // 4), "=r,r")
        word = m.load(words, n).value
        wide = [_asm(word.type, [word, factor], expand_text(pair), "=r,r,r") for pair in range(4)]
        place = target.address(piece_place(row, n) >> 2)
        _asm(None, [place, *wide], "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r")


def piece_place(row, piece: int):
    """Byte offset of a row's piece of eight channels in a tile; see `sparse_mla.gpu_rows.piece_offset`."""
    line = row & 7
    return (row >> 3) * (8 * 2 * DIM) + line * SWIZZLE + (piece // 8 * (8 * SWIZZLE)) + (line ^ piece % 8) * 16
