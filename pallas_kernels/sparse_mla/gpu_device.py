"""What a warpgroup does for sparse MLA that Pallas's interpreter does not know, and its stand-in in jnp."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import MOSAIC_GPUS, Chip, require
from pallas_kernels.sparse_mla.gpu_rows import ROWS, copy_rows, tiled

HEADS = 64  # heads of one block
COMPUTE = 2  # warpgroups that attend, each to half the channels
AT_ONCE = 128  # channels of one call for scores: more have more descriptors than there are registers
LINES, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def device_of(chip: Chip, op: str, interpret: Any) -> Device:
    """What `chip` multiplies with, or its stand-in; ValueError if there is neither."""
    require(chip, op, platform="cuda", generations=MOSAIC_GPUS)
    device = Device() if chip.generation == 90 else Blackwell()
    return Interpreted(device) if interpret else device


class Device:
    """Layouts, inline code and register operands, for sm_90a (wgmma): both warpgroups form all the scores.

    The sums of a warpgroup are parts fp32 [64, part], in registers.

    swizzle: bytes of the lines of a row tile's atoms; part: channels of one value product; registers: of a thread that
    computes, and of one that gathers (the four warpgroups together have 512).
    """

    swizzle, part, registers = 128, 128, (200, 56)

    def scratch(self, width: int) -> list:
        """What `attend` wants besides, for rows of `width` channels."""
        return []

    def attend(self, warpgroup, body, scratch) -> None:
        """Run body(device, half of the channels) in each warpgroup that computes."""
        body(self, warpgroup)

    def full(self, shape, value):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), LINES if len(shape) == 1 else plgpu.Layout.WGMMA)

    def load_columns(self, ref):
        return plgpu.load(ref, (), layout=COLUMNS, optimized=False)

    def load_lines(self, ref):
        return plgpu.load(ref, (), layout=LINES, optimized=False)

    def copy_rows(self, rows, listed, tile, numbers):
        copy_rows(rows, listed, tile, numbers, self.swizzle)

    def sums(self, acc) -> Iterator[jax.Array]:
        yield from acc

    def scores(self, q, rows):
        """q [64, D] times rows [64, D] -> fp32 [64, 64]."""

        def multiply(ref):
            plgpu.wgmma(ref, q, rows.transpose((1, 0)))
            return ref[...]

        return pl.run_scoped(multiply, plgpu.ACC((HEADS, ROWS), jnp.float32))

    def zeros(self, parts: int) -> list:
        return [self.full((HEADS, self.part), 0.0) for _ in range(parts)]

    def accumulate(self, acc, rescale, weights, rows):
        """The sums, their lines scaled, plus weights bf16 [64, 64] times each part's rows [64, part]."""
        multiply = lambda part, here: pl.run_state(lambda ref: plgpu.wgmma(ref, weights, here))(plgpu.ACC.init(part))
        return [multiply(scale_lines(part, rescale), here) for part, here in zip(acc, rows, strict=True)]


class Blackwell(Device):
    """For sm_100a (tcgen05): scores and sums in tensor memory, of M = 64, hence in the registers' layout of wgmma.

    Warpgroup 0 asks for the scores and both read them. Mosaic cuts the columns of such products in two, each of whole
    atoms: 64 rows leave atoms of 64 bytes a line.
    """

    swizzle, part, registers = 64, 64, (152, 104)

    def __init__(self, half: int = 0, score=None, held=(), weights=None, formed=None, seen=None, done=None):
        self.half, self.score, self.held, self.weights = half, score, held, weights
        self.formed, self.seen, self.done = formed, seen, done

    def scratch(self, width):
        barrier = lambda arrivals, count: plgpu.Barrier(
            num_arrivals=arrivals, num_barriers=count, orders_tensor_core=True
        )
        return [
            plgpu.SMEM((COMPUTE, HEADS, ROWS), jnp.bfloat16, transforms=tiled(self.swizzle)),
            *(barrier(1, 1), barrier(COMPUTE, 1), barrier(1, COMPUTE)),
            plgpu.TMEM((HEADS, ROWS), jnp.float32),
            *[plgpu.TMEM((HEADS, self.part), jnp.float32)] * (width // self.part),
        ]

    def attend(self, warpgroup, body, scratch):
        weights, formed, seen, done, score, *held = scratch
        each = len(held) // COMPUTE
        for half in range(COMPUTE):  # tensor memory is chosen when the kernel is compiled
            mine = held[half * each : (half + 1) * each]
            device = Blackwell(half, score, mine, weights.at[half], formed, seen, done.at[half])
            pl.when(warpgroup == half)(functools.partial(body, device, half))

    def scores(self, q, rows):
        if self.half == 0:
            self._form_scores(q, rows)
        plgpu.barrier_wait(self.formed)
        value = self._load(self.score)
        plgpu.barrier_arrive(self.seen)  # nobody still reads these scores when the next are formed
        plgpu.barrier_wait(self.seen)
        return value

    def _form_scores(self, q, rows):
        """In a loop: the descriptors of all channels at once would take more registers than there are."""

        def some(i, _):
            here = pl.ds(i * AT_ONCE, AT_ONCE)
            part = rows.at[:, here].transpose((1, 0))
            plgpu.tcgen05_mma(self.score, q.at[:, here], part, accumulate=i > 0)
            return ()

        jax.lax.fori_loop(0, q.shape[1] // AT_ONCE, some, ())
        plgpu.tcgen05_commit_arrive(self.formed)

    def _load(self, ref):
        value = plgpu.async_load_tmem(ref, layout=plgpu.Layout.WGMMA)
        plgpu.wait_load_tmem()
        return value

    def zeros(self, parts):
        for held in self.held:
            plgpu.async_store_tmem(held, self.full((HEADS, self.part), 0.0))
        plgpu.commit_tmem()
        return []

    def accumulate(self, acc, rescale, weights, rows):
        self.weights[...] = weights
        plgpu.commit_smem()
        for held, here in zip(self.held, rows, strict=True):
            plgpu.async_store_tmem(held, scale_lines(self._load(held), rescale))
            plgpu.commit_tmem()
            plgpu.tcgen05_mma(held, self.weights, here)
        plgpu.tcgen05_commit_arrive(self.done)
        plgpu.barrier_wait(self.done)
        return acc

    def sums(self, acc):
        yield from map(self._load, self.held)


class Interpreted(Device):
    """The same in jnp; loops, barriers, masks and the order of all steps stay the kernel's own."""

    def __init__(self, device: Device):
        self.swizzle, self.part, self.registers = device.swizzle, device.part, device.registers

    def full(self, shape, value):
        return jnp.full(shape, value, jnp.float32)

    def load_columns(self, ref):
        return ref[...]

    def load_lines(self, ref):
        return ref[...]

    def copy_rows(self, rows, listed, tile, numbers):
        values = rows[0][...] if len(rows) == 1 else _widened(*(part[...] for part in rows))
        if isinstance(listed, tuple):
            index = listed[0] + jnp.arange(ROWS, dtype=jnp.int32)
            index = jnp.where(index < listed[1], index, -1)
        else:
            index = listed[...]
        numbers[...] = index
        tile[...] = jnp.where((index >= 0)[:, None], values[jnp.maximum(index, 0)], 0)

    def scores(self, q, rows):
        return jnp.dot(q[...], rows[...].T, preferred_element_type=jnp.float32)

    def accumulate(self, acc, rescale, weights, rows):
        multiply = lambda here: jnp.dot(weights, here[...], preferred_element_type=jnp.float32)
        return [scale_lines(part, rescale) + multiply(here) for part, here in zip(acc, rows, strict=True)]


def scale_lines(x, factors):
    return x * jax.lax.broadcast_in_dim(factors, x.shape, [0])


def _widened(codes, scales, rope):
    """bf16 [S, D] of the three parts of `Fp8Rows`, as the gathering threads do it."""
    scale = jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    scale = jnp.repeat(scale, 64, axis=-1)[:, : codes.shape[-1]]
    return jnp.concatenate([(codes.astype(jnp.float32) * scale).astype(jnp.bfloat16), rope], axis=-1)
