"""Gathering KV rows into shared memory, one warpgroup at a time: the part of the GPU kernels that Pallas cannot say.

A tile of 64 rows lies as the tensor core reads it: atoms of 8 rows of `swizzle` bytes, 128 or 64, row groups
outermost, the 16-byte pieces of a row exchanged by its number. `piece_offset` is that layout; a test compares it with
the one that Mosaic GPU uses itself.
"""

from __future__ import annotations

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

ROWS = 64  # of one tile
BATCH = 4  # rows of FP8 codes that a warp has on their way at once: half an atom


def tiled(swizzle: int) -> tuple:
    """The transforms of bf16 shared memory whose atoms have lines of `swizzle` bytes."""
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def exchange(row, swizzle: int):
    """What the number of a piece within its line is exchanged by: the bits of the row above 128 bytes of lines."""
    return row % 8 // (128 // swizzle)


def piece_offset(row, piece, pieces: int, swizzle: int = 128):
    """Byte offset of 16-byte piece `piece` of row `row` in a tile whose rows have `pieces` of them."""
    wide = swizzle // 16
    atom = row // 8 * (pieces * 128) + piece // wide * (8 * swizzle)
    return atom + row % 8 * swizzle + (piece % wide ^ exchange(row, swizzle)) * 16


def _i32(value):
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def _i64(value):
    return arith.extsi(ir.IntegerType.get_signless(64), value)


def _asm(result, operands, text: str, constraints: str):
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=True, asm_dialect=0)


def _address(ref, space: int):
    """Where ref starts: i64 in global memory (space 1), i32 in shared memory (3)."""
    pointer = mgpu.utils.memref_ptr(ref)
    return llvm.ptrtoint(ir.IntegerType.get_signless(32 if space == 3 else 64), pointer)


def _threads():
    """This thread's warp in its warpgroup, and its lane."""
    thread = arith.andi(mgpu.utils.thread_idx(), _i32(127))
    return arith.shrui(thread, _i32(5)), arith.andi(thread, _i32(31))


def _broadcast(value, lane):
    """The value that `lane` of the warp holds."""
    return _asm(value.type, [value, lane], "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r")


def _entry(warp, lane, scale: int = 1):
    """16 * warp + lane mod 16, scaled: the entry of the tile's list that a lane looks after; each has two lanes."""
    return arith.muli(arith.addi(arith.muli(warp, _i32(16)), arith.andi(lane, _i32(15))), _i32(scale))


def _listed_rows(index, warp, lane):
    """This lane's row number in a list."""
    address = arith.addi(_address(index, 1), _i64(_entry(warp, lane, 4)))
    return _asm(ir.IntegerType.get_signless(32), [address], "ld.global.nc.b32 $0, [$1];", "=r,l")


def _counted_rows(start, count, warp, lane):
    """This lane's row number among start, start + 1, ...; -1 from `count` on."""
    row = arith.addi(start, _entry(warp, lane))
    return arith.select(arith.cmpi(arith.CmpIPredicate.slt, row, count), row, _i32(-1))


def _copy_bf16(rows, tile, listed, warp, lane, swizzle):
    """A warp copies 16 rows, half a kibibyte at a time; a row number below zero gives zeros."""
    pieces = ir.MemRefType(rows.type).shape[-1] // 8
    source = arith.addi(_address(rows, 1), _i64(arith.muli(lane, _i32(16))))
    base = arith.addi(_address(tile, 3), arith.muli(warp, _i32(2 * pieces * 128)))
    columns, inner = _atom_of(base, lane, swizzle)
    for r in range(16):
        row = _broadcast(listed, _i32(r))
        picked = arith.cmpi(arith.CmpIPredicate.sge, row, _i32(0))
        start = arith.muli(_i64(arith.select(picked, row, _i32(0))), _i64(_i32(pieces * 16)))
        size = arith.select(picked, _i32(16), _i32(0))
        for first in range(0, pieces, 32):
            begin = arith.addi(arith.addi(source, start), _i64(_i32(first * 16)))
            _copy_piece(columns, inner, piece_offset(r, first, pieces, swizzle), swizzle, begin, size)
    _asm(None, [], "cp.async.wait_all;", "")


def _atom_of(base, piece, swizzle):
    """Where the atom of 16-byte piece `piece` starts, and the piece's bytes within a line of it."""
    wide = swizzle // 16
    atom = arith.muli(arith.divui(piece, _i32(wide)), _i32(8 * swizzle))
    return arith.addi(base, atom), arith.muli(arith.remui(piece, _i32(wide)), _i32(16))


def _load_codes(address, wanted):
    """Four words of 16 codes from global memory, zeros where not wanted."""
    i32 = ir.IntegerType.get_signless(32)
    text = """{ .reg .pred p; setp.ne.b32 p, $5, 0;
      mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
      @p ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4]; }"""
    words = _asm(llvm.StructType.get_literal([i32] * 4), [address, wanted], text, "=&r,=&r,=&r,=&r,l,r")
    return [llvm.extractvalue(i32, words, [k]) for k in range(4)]


def _load_scale(address, wanted):
    """Two bf16 of 2 ** (code - 127), in one word."""
    text = """{ .reg .pred p, q; .reg .b32 t; setp.ne.b32 p, $2, 0; mov.b32 t, 0;
      @p ld.global.nc.u8 t, [$1]; setp.eq.b32 q, t, 0;
      shl.b32 t, t, 7; @q mov.b32 t, 64; prmt.b32 $0, t, t, 0x1010; }"""
    return _asm(ir.IntegerType.get_signless(32), [address, wanted], text, "=r,l,r")


def _widen(word, scale) -> list:
    """Four e4m3 codes times the scale, as two words of bf16 pairs.

    An e4m3 code whose exponent and mantissa bits move to the bf16 places is its value times 2 ** -120, also where it is
    subnormal; both products are by powers of two, hence exact.
    """
    text = """{ .reg .b32 t, m; prmt.b32 t, $1, 0, %s; and.b32 m, t, 0x7f007f00; shr.u32 m, m, 4;
      and.b32 t, t, 0x80008000; or.b32 m, m, t; mov.b32 t, 0x7b807b80;
      mul.rn.bf16x2 m, m, t; mul.rn.bf16x2 $0, m, $2; }"""
    i32 = ir.IntegerType.get_signless(32)
    return [_asm(i32, [word, scale], text % selector, "=r,r,r") for selector in ("0x1404", "0x3424")]


def _store_piece(base, inner, offset: int, swizzle: int, words, wanted) -> None:
    """Store 16 bytes at base + `offset` of a line's first piece, exchanged by the piece's own bytes `inner`."""
    line, bits = offset & -swizzle, offset & (swizzle - 1)
    text = f"""{{ .reg .pred p; .reg .b32 a; setp.ne.b32 p, $6, 0; xor.b32 a, $1, {bits};
      add.u32 a, a, $0; @p st.shared.v4.b32 [a + {line}], {{$2, $3, $4, $5}}; }}"""
    _asm(None, [base, inner, *words, wanted], text, "r,r,r,r,r,r,r")


def _copy_piece(base, inner, offset: int, swizzle: int, source, size, wanted=None) -> None:
    """The same for 16 bytes copied from global memory on their own time; zeros where size is 0."""
    wanted = _i32(1) if wanted is None else wanted
    line, bits = offset & -swizzle, offset & (swizzle - 1)
    text = f"""{{ .reg .pred p; .reg .b32 a; setp.ne.b32 p, $4, 0; xor.b32 a, $1, {bits};
      add.u32 a, a, $0; @p cp.async.cg.shared.global.L2::128B [a + {line}], [$2], 16, $3; }}"""
    _asm(None, [base, inner, source, size, wanted], text, "r,r,l,r,r")


def _copy_fp8(codes, scales, rope, tile, listed, warp, lane, swizzle):
    """A warp widens 16 rows: lane l the codes 16 l .. 16 l + 15; the rope channels are copied as they are."""
    code_bytes, scale_bytes = (ir.MemRefType(x.type).shape[-1] for x in (codes, scales))
    rope_pieces = ir.MemRefType(rope.type).shape[-1] // 8
    pieces = code_bytes // 8 + rope_pieces
    base = arith.addi(_address(tile, 3), arith.muli(warp, _i32(2 * pieces * 128)))
    below = lambda n: arith.extui(lane.type, arith.cmpi(arith.CmpIPredicate.ult, lane, _i32(n)))
    has_codes, has_rope = below(code_bytes // 16), below(rope_pieces)
    offsets = arith.muli(lane, _i32(16)), arith.shrui(lane, _i32(2)), arith.muli(lane, _i32(16))
    starts = [
        arith.addi(_address(x, 1), _i64(offset)) for x, offset in zip((codes, scales, rope), offsets, strict=True)
    ]
    strides = code_bytes, scale_bytes, rope_pieces * 16
    columns, inner = _atom_of(base, arith.muli(lane, _i32(2)), swizzle)  # of pieces 2 l and 2 l + 1
    rope_columns, rope_inner = _atom_of(arith.addi(base, _i32((pieces - rope_pieces) * 128)), lane, swizzle)

    # Half the rows of an atom at a time: a loop, lest all addresses be formed ahead and take up the registers.
    @mgpu.utils.fori(_i32(16 // BATCH), ())
    def _batch(i, _):
        odd = arith.andi(i, _i32(1))
        line = arith.addi(
            arith.muli(arith.shrui(i, _i32(1)), _i32(pieces * 128)), arith.muli(odd, _i32(BATCH * swizzle))
        )
        half = arith.muli(odd, _i32(exchange(BATCH, swizzle) * 16))
        loaded = []
        for r in range(BATCH):
            row = _broadcast(listed, arith.addi(arith.muli(i, _i32(BATCH)), _i32(r)))
            picked = arith.cmpi(arith.CmpIPredicate.sge, row, _i32(0))
            row = _i64(arith.select(picked, row, _i32(0)))
            at = [arith.addi(start, arith.muli(row, _i64(_i32(n)))) for start, n in zip(starts, strides, strict=True)]
            wanted = arith.andi(has_codes, arith.extui(lane.type, picked))
            loaded.append((_load_codes(at[0], wanted), _load_scale(at[1], wanted)))
            size = arith.select(picked, _i32(16), _i32(0))
            place, offset = arith.addi(rope_columns, line), piece_offset(r, 0, pieces, swizzle)
            _copy_piece(place, arith.xori(rope_inner, half), offset, swizzle, at[2], size, has_rope)
        for r, (words, scale) in enumerate(loaded):
            wide = [pair for word in words for pair in _widen(word, scale)]
            place, offset = arith.addi(columns, line), piece_offset(r, 0, pieces, swizzle)
            for k in range(2):
                mine = arith.xori(arith.xori(inner, _i32(16 * k)), half)
                _store_piece(place, mine, offset, swizzle, wide[4 * k : 4 * k + 4], has_codes)
        return ()

    _asm(None, [], "cp.async.wait_all;", "")


def copy_rows(rows: tuple, listed, tile, numbers, swizzle: int) -> None:
    """Fill tile [64, D] bf16 with rows that are listed; a row number of -1 gives zeros.

    The calling warpgroup's threads have each waited for their own copies on return.

    Args:
      rows: one reference, [S, D] bf16; or three, of `Fp8Rows`: codes, scales, rope.
      listed: a reference to int32 [64] row numbers; or (start, count), for the rows start .. start + 63 below count.
      tile: shared memory with the transforms `tiled(swizzle)`.
      numbers: shared memory int32 [64], set to the row numbers.
    """
    by_count = isinstance(listed, tuple)
    scalar = plgpu.Layout.WG_SPLAT(())
    list_type = (scalar, scalar) if by_count else plgpu.RefType()
    row_types = tuple(plgpu.RefType() for _ in rows)

    @plgpu.inline_mgpu(arg_types=(row_types, list_type, plgpu.RefType(tiled(swizzle)), plgpu.RefType()))
    def copy(_, rows, listed, tile, numbers):
        warp, lane = _threads()
        if by_count:
            start, count = (x.registers.item() for x in listed)
            mine = _counted_rows(start, count, warp, lane)
        else:
            mine = _listed_rows(listed, warp, lane)
        _asm(None, [arith.addi(_address(numbers, 3), _entry(warp, lane, 4)), mine], "st.shared.b32 [$0], $1;", "r,r")
        if len(rows) == 1:
            _copy_bf16(rows[0], tile, mine, warp, lane, swizzle)
        else:
            codes, scales, rope = rows
            _copy_fp8(codes, scales, rope, tile, mine, warp, lane, swizzle)

    copy(rows, listed, tile, numbers)
