"""What a warpgroup does for FP8 and FP4 products that Pallas's interpreter does not know, and its stand-in in jnp."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.chips import MOSAIC_GPUS, Chip, require
from pallas_kernels.formats import decode_e2m1, decode_e8m0, unpack_fp4

CODE_TILE = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
WIDE_TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
FP4_STEP = 256  # channels of FP4 weights in a step: 128 bytes of each row
LINES, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def device_of(chip: Chip, op: str, interpret: Any) -> Device:
    """What `chip` multiplies with, or its stand-in; ValueError if there is neither."""
    require(chip, op, platform="cuda", generations=MOSAIC_GPUS)
    device = Device() if chip.generation == 90 else Blackwell()
    return Interpreted(device) if interpret else device


def fragment_order(x):
    """Channels [..., K] in the order in which `Device.expand` hands them to the tensor core, 256 by 256.

    Thread t of the four that share a row holds channels 64 t .. 64 t + 63: two pieces of four words of eight. A word's
    channels n and n + 4 become a pair; two pairs, 8 apart, are what one step of 16 channels takes of a thread.
    """
    split = x.reshape(*x.shape[:-1], -1, 4, 2, 4, 2, 2, 2)  # block, t, piece, word, n >= 4, step, 8 apart
    lead = tuple(range(x.ndim))
    order = [lead[-1] + n for n in (2, 3, 5, 6, 1, 4)]
    return split.transpose(*lead, *order).reshape(x.shape)


class Device:
    """Layouts, inline code and register operands, for sm_90a (wgmma).

    warpgroups: that multiply; height: of the left operand of each; narrowest: fewest columns of the right one; part:
    most columns of a part of the product, lest two whole ones be in registers.
    """

    warpgroups, height, narrowest, part = 2, 64, 8, 128
    registers: tuple[int, int] | None = (232, 40)  # of a multiplying and of the fetching thread; together 504 or fewer
    registers_many_rows = (232, 32)  # the same where the sums of 64 x 256 products are kept
    fragment, columns = plgpu.Layout.WGMMA, COLUMNS

    def scratch(self, columns: int, channels: int, is_wide: bool) -> list:
        """What `bound` wants besides."""
        return []

    def bound(self, *scratch) -> Device:
        """Itself, with its scratch."""
        return self

    def set_registers(self, fetches: bool, many_rows: bool = False) -> None:
        registers = self.registers_many_rows if many_rows else self.registers
        if registers:
            plgpu.set_max_registers(registers[fetches], action="decrease" if fetches else "increase")

    def zeros(self, shape):
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), self.fragment)

    def load_lines(self, ref):
        return plgpu.load(ref, (), layout=LINES, optimized=False)

    def load_columns(self, ref):
        return plgpu.load(ref, (), layout=self.columns, optimized=False)

    def across(self, columns, shape):
        """One value a column, repeated down the lines."""
        return jax.lax.broadcast_in_dim(columns, shape, [1])

    def product(self, left, right) -> Iterator[jax.Array]:
        """left [height, K] times right [columns, K] transposed, fp32, in parts of `part` columns at most."""

        def multiply(acc):
            plgpu.wgmma(acc, left, right.transpose((1, 0)))
            return acc[...]

        yield pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[0]), jnp.float32))

    def widen(self, codes):
        """e4m3 [64, 128] in shared memory -> bf16 in registers, as a left operand."""
        value = plgpu.load(codes, (), layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
        convert = plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA_UPCAST_2X,),
            return_type=plgpu.ShapeDtypeStruct(codes.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA_UPCAST_2X),
        )
        return plgpu.layout_cast(convert(_widen_registers)(value), plgpu.Layout.WGMMA)

    def load_fp4_scales(self, scale, row, step):
        """The e8m0 bytes of 64 rows' 256 channels: of each row those of the channels that a thread expands."""
        scalar = plgpu.Layout.WG_SPLAT(())
        load = plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), scalar, scalar),
            return_type=plgpu.ShapeDtypeStruct((64,), jnp.int32, layout=LINES),
        )
        return load(_load_fp4_scales)(scale, row, step)

    def expand(self, pairs, scales):
        """e2m1 pairs uint8 [64, 128] in shared memory -> bf16 [64, 256] in registers, channels in `fragment_order`."""
        shape = pairs.shape[0], FP4_STEP
        convert = plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(CODE_TILE), LINES),
            return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
        )
        return convert(_expand_registers)(pairs, scales)

    def store(self, tile, value, *, transposed=False):
        """Store bf16 [64, columns], or its transpose, to a tile whose rows have 64 elements."""
        inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(WIDE_TILE), plgpu.Layout.WGMMA))
        inline(functools.partial(_store_matrices, transposed=transposed))(tile, value)


class Blackwell(Device):
    """For sm_100a (tcgen05): both operands in shared memory, the product in tensor memory.

    One warpgroup multiplies: M = 128 is what fills the tensor core. Expanded weights go back to shared memory.
    """

    warpgroups, height, narrowest, part, registers = 1, 128, 16, 32, None
    fragment, columns = plgpu.Layout.TCGEN05, plgpu.Layout.TCGEN05.reduce(0)

    def __init__(self, accumulator=None, done=None, read=None, left=None):
        self.accumulator, self.done, self.read, self.left = accumulator, done, read, left

    def scratch(self, columns, channels, is_wide):
        left = [plgpu.SMEM((self.height, channels), jnp.bfloat16, transforms=WIDE_TILE)] if is_wide else []
        accumulator = plgpu.TMEM((self.height, max(columns, 32)), jnp.float32)
        return [accumulator, plgpu.Barrier(orders_tensor_core=True), plgpu.Barrier(orders_tensor_core=True), *left]

    def bound(self, *scratch):
        return Blackwell(*scratch)

    def product(self, left, right):
        accumulator = self.accumulator.at[:, pl.ds(0, right.shape[0])]
        plgpu.tcgen05_mma(accumulator, left, right.transpose((1, 0)), self.done, accumulate=False)
        plgpu.barrier_wait(self.done)
        width = min(self.part, right.shape[0])
        parts = [accumulator.at[:, pl.ds(start, width)] for start in range(0, right.shape[0], width)]
        for part in parts:
            value = plgpu.async_load_tmem(part, layout=self.fragment)
            plgpu.wait_load_tmem()
            yield value
        plgpu.barrier_arrive(self.read)  # all four warps have read before one of them starts the next product
        plgpu.barrier_wait(self.read)

    def across(self, columns, shape):
        return plgpu.layout_cast(super().across(columns, shape), self.fragment)

    def widen(self, codes):
        for half in self._halves():
            self.left[half] = super().widen(codes.at[half])
        plgpu.commit_smem()
        return self.left

    def load_fp4_scales(self, scale, row, step):
        return [super(Blackwell, self).load_fp4_scales(scale, row + half.start, step) for half in self._halves()]

    def expand(self, pairs, scales):
        for half, some in zip(self._halves(), scales, strict=True):
            self.left[half] = super().expand(pairs.at[half], some)
        plgpu.commit_smem()
        return self.left

    def store(self, tile, value, *, transposed=False):
        tile.transpose((1, 0))[...] = plgpu.layout_cast(value, plgpu.Layout.TCGEN05_TRANSPOSED)

    def _halves(self) -> list[Any]:
        return [pl.ds(start, 64) for start in range(0, self.height, 64)]


class Interpreted(Device):
    """The same in jnp; loops, barriers, copies and the order of all steps stay the kernel's own."""

    def __init__(self, device: Device):
        for name in ("warpgroups", "height", "narrowest", "part"):
            setattr(self, name, getattr(device, name))

    def zeros(self, shape):
        return jnp.zeros(shape, jnp.float32)

    def load_lines(self, ref):
        return ref[...]

    def load_columns(self, ref):
        return ref[...]

    def product(self, left, right):
        left = left if isinstance(left, jax.Array) else left[...]
        product = jnp.dot(left.astype(jnp.float32), right[...].astype(jnp.float32).T)
        yield from jnp.split(product, list(range(self.part, product.shape[1], self.part)), axis=1)

    def widen(self, codes):
        return codes[...].astype(jnp.bfloat16)

    def load_fp4_scales(self, scale, row, step):
        return scale[pl.ds(row, self.height), pl.ds(step * (FP4_STEP // 32), FP4_STEP // 32)]

    def expand(self, pairs, scales):
        factors = jnp.repeat(decode_e8m0(scales), 32, axis=1)
        return fragment_order((decode_e2m1(unpack_fp4(pairs[...])) * factors).astype(jnp.bfloat16))

    def store(self, tile, value, *, transposed=False):
        tile[...] = value.T if transposed else value


def _i32(value):
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


class Word:
    """An i32 of the compiler's, with the arithmetic of a Python int."""

    def __init__(self, value):
        self.value = value

    def _with(self, op: Any, other) -> Self:
        return type(self)(op(self.value, other.value if isinstance(other, Word) else _i32(other)))

    def __and__(self, other):
        return self._with(arith.andi, other)

    def __xor__(self, other):
        return self._with(arith.xori, other)

    def __add__(self, other):
        return self._with(arith.addi, other)

    def __mul__(self, other):
        return self._with(arith.muli, other)

    def __rshift__(self, other):
        return self._with(arith.shrui, other)


def _asm(result, operands, text: str, constraints: str, *, pure: bool = False):
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=not pure, asm_dialect=0)


def _int(bits: int = 32):
    return ir.IntegerType.get_signless(bits)


def _store_matrices(_, tile, value, *, transposed: bool):
    """Four 8 x 8 matrices an instruction, each lane giving the place of one of their 32 rows.

    The thread's number is read anew each time: places known ahead of the loops would be kept in registers that the
    sums need.
    """
    address = Word(llvm.ptrtoint(_int(), mgpu.utils.memref_ptr(tile)))
    thread = Word(_asm(_int(), [], "mov.u32 $0, %tid.x;", "=r")) & 127
    words = [mgpu.utils.bitcast(register, _int()) for register in value.registers.flat]
    how = ".trans" if transposed else ""
    for column in range(0, value.shape[1] // 8, 2):  # words of 16 rows x 8 columns come in pairs, upper rows first
        place = address + matrix_place(thread, column, transposed)
        some = words[2 * column : 2 * column + 4]  # the last time maybe 2
        names = ", ".join(f"${n + 1}" for n in range(len(some)))
        text = f"stmatrix.sync.aligned.m8n8.x{len(some)}{how}.shared.b16 [$0], {{{names}}};"
        _asm(None, [place.value, *some], text, ",".join("r" * (len(some) + 1)))


def matrix_place(thread, column: int, transposed: bool):
    """Byte offset, in a swizzled bf16 tile with 64 columns, of the row that `thread` gives to a store of matrices.

    The four 8 x 8 matrices are those of the value's rows 16 * warp and 16 * warp + 8, first in its columns
    8 * column .., then in the next eight.
    """
    line, lower, right, warp = thread & 7, thread >> 3 & 1, thread >> 4 & 1, thread >> 5
    group, piece = (warp * 2 + lower), right + column
    group, piece = (piece, group) if transposed else (group, piece)
    return group * 1024 + line * 128 + (piece ^ line) * 16


def _widen_registers(_, codes):
    registers = np.empty_like(codes.registers)
    for place, register in np.ndenumerate(codes.registers):
        word = mgpu.utils.bitcast(register, _int())
        halves = [_widen_pair(word, first) for first in (0, 2)]
        registers[place] = _vector(halves, ir.BF16Type.get())
    return mgpu.FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=None)


def _widen_pair(word, first: int):
    return _asm(_int(), [word], widen_text(first), "=r,r", pure=True)


def widen_text(first: int) -> str:
    """PTX: codes `first` and `first` + 1 of the four e4m3 codes in $1, as two bf16 in $0.

    An e4m3 code whose exponent and mantissa bits move to the bf16 places is its value times 2 ** -120, also where it is
    subnormal; the product with 2 ** 120 is exact.
    """
    return f"""{{ .reg .b32 t, m; prmt.b32 t, $1, 0, 0x{first + 1}4{first}4; shr.u32 m, t, 4;
      and.b32 m, m, 0x07f007f0; and.b32 t, t, 0x80008000; or.b32 m, m, t; mov.b32 t, 0x7b807b80;
      mul.rn.bf16x2 $0, m, t; }}"""


def _thread():
    """This thread's warp in its warpgroup, its row group's row and its place among the four that share a row."""
    thread = Word(mgpu.utils.thread_idx()) & 127
    return thread >> 5, thread >> 2 & 7, thread & 3


def _load_fp4_scales(_, scale, row, step):
    """Per row group a word: the bytes of channels 64 t .. 64 t + 31 and of the next 32."""
    stride = ir.MemRefType(scale.type).shape[-1]
    warp, line, quarter = _thread()
    start = llvm.ptrtoint(_int(64), mgpu.utils.memref_ptr(scale))
    rows = Word(row.registers.item()) + warp * 16 + line
    within = Word(step.registers.item()) * (FP4_STEP // 32) + quarter * 2
    registers = np.empty((1, 1, 2, 1, 1), dtype=object)
    for lower in (0, 1):
        text = """{ .reg .b64 a, b; .reg .b16 t; mad.wide.u32 a, $2, $3, $1; cvt.u64.u32 b, $4; add.u64 a, a, b;
          ld.global.nc.u16 t, [a]; cvt.u32.u16 $0, t; }"""
        operands = [start, (rows + 8 * lower).value, _i32(stride), within.value]
        word = _asm(_int(), operands, text, "=r,l,r,r,r", pure=True)
        registers[0, 0, lower, 0, 0] = vector.broadcast(ir.VectorType.get((1,), _int()), word)
    layout = LINES.to_mgpu()
    registers = registers.reshape(layout.registers_shape((64,)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _expand_registers(_, pairs, scales):
    """Registers of piece, word, pair and row group, from two pieces of a row's bytes in each row group."""
    start, (warp, line, quarter) = Word(llvm.ptrtoint(_int(), mgpu.utils.memref_ptr(pairs))), _thread()
    words = np.empty((2, 4, 4, 2), dtype=object)
    for lower, both in enumerate(scales.registers.flat):
        both = mgpu.utils.bitcast(both, _int())
        for piece in (0, 1):
            place = start + piece_place(warp, line, quarter, piece)
            text = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {lower * 1024}];"
            loaded = _asm(llvm.StructType.get_literal([_int()] * 4), [place.value], text, "=r,=r,=r,=r,r")
            factor = _asm(_int(), [both], factor_text(piece), "=r,r", pure=True)
            for n, pair in np.ndindex(4, 4):
                operands = [llvm.extractvalue(_int(), loaded, [n]), factor]
                words[piece, n, pair, lower] = _asm(_int(), operands, expand_text(pair), "=r,r,r", pure=True)
    registers = np.empty(words.size, dtype=object)
    for n, word in enumerate(words.flat):
        registers[n] = _vector([word], ir.BF16Type.get())
    layout = plgpu.Layout.WGMMA.to_mgpu()
    registers = registers.reshape(layout.registers_shape((64, FP4_STEP)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def piece_place(warp, line, quarter, piece: int):
    """Byte offset, in a swizzled tile [64, 128 bytes], of a thread's piece of its upper row; the lower is 1024 on."""
    return warp * 2048 + line * 128 + ((quarter * 2 + piece) ^ line) * 16


def factor_text(piece: int) -> str:
    """PTX: scale byte `piece` of $1 at the bits of a bf16 exponent, twice; 0 stands for 2 ** -127, a subnormal."""
    return f"""{{ .reg .b32 t; .reg .pred p; shl.b32 t, $1, {24 - 8 * piece}; shr.u32 t, t, 24; shl.b32 t, t, 7;
      setp.eq.u32 p, t, 0; selp.b32 t, 64, t, p; prmt.b32 $0, t, t, 0x1010; }}"""


def expand_text(n: int) -> str:
    """PTX: codes n and n + 4 of the eight e2m1 codes in $1, times the bf16 pair $2, as two bf16 in $0.

    A product with a sum of two powers of two copies a code to both places: its sign to bit 15, exponent and mantissa to
    bits 8 .. 6, where they are 2 ** -126 of their value, subnormal or not. Both products of floats are exact.
    """
    mask, copies = (0xF000F0, 0x104) if n % 2 else (0xF000F, 0x1040)
    return f"""{{ .reg .b32 t, m; shr.u32 t, $1, {n // 2 * 8}; and.b32 t, t, {mask}; mul.lo.u32 t, t, {copies};
      and.b32 t, t, 0x81c081c0; mov.b32 m, 0x7e807e80; mul.rn.bf16x2 t, t, m; mul.rn.bf16x2 $0, t, $2; }}"""


def _vector(words: list, dtype):
    """Words in a row as one vector of `dtype`."""
    vector_type = ir.VectorType.get((1,), _int())
    joined = mgpu.utils.vector_concat([vector.broadcast(vector_type, word) for word in words])
    length = 32 * len(words) // mgpu.utils.bitwidth(dtype)
    return vector.bitcast(ir.VectorType.get((length,), dtype), joined)
