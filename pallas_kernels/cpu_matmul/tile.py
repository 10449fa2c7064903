"""One tile of a product, in vectors: rows of a weight, read where they lie, times columns of rows laid out for it."""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

IS_WIDE = llvm.get_host_cpu_features().get("avx512f", False)
LANES = 16 if IS_WIDE else 8  # rows of x in a vector
HEIGHT = 8 if IS_WIDE else 4  # rows of a weight; two vectors of sums for each fit a processor's registers

_FLOAT, _WORD = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)


def _load(builder, address, kind):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _spread(builder, value):
    """A vector of one value."""
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _zip(builder, a, b, first: int):
    """Half of the elements of two vectors, in turns."""
    places = [first + i // 2 + (i % 2) * LANES for i in range(LANES)]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), LANES), places))


def _store(builder, sums, out, stride):
    """HEIGHT vectors of LANES -> LANES rows of HEIGHT: each round of zips moves one bit of the place to its end."""
    half, place = HEIGHT // 2, 1
    while place < HEIGHT:
        pairs = [(sums[i], sums[i + half]) for i in range(half)]
        sums = [_zip(builder, *pair, first) for pair in pairs for first in (0, LANES // 2)]
        place *= 2
    row = ir.VectorType(_FLOAT, HEIGHT)
    for i, vector in enumerate(sums):
        for j in range(LANES // HEIGHT):
            places = [ir.Constant(ir.IntType(32), j * HEIGHT + m) for m in range(HEIGHT)]
            part = builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), HEIGHT), places))
            r = ir.Constant(_WORD, i * (LANES // HEIGHT) + j)
            address = builder.add(out, builder.mul(r, stride))
            builder.store(part, builder.inttoptr(address, row.as_pointer()), align=4)


def _tile(vectors: int):
    """`multiply_one` and `multiply_two`: so many vectors of rows at a time."""

    def code(context, builder, sig, args):
        w, w_stride, x, x_stride, count, out, out_stride = args
        name = f"llvm.fma.v{LANES}f32"
        module = builder.module
        fma = module.globals.get(name) or ir.Function(module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), name)
        number = lambda n: ir.Constant(_WORD, n)
        starts = [builder.add(w, builder.mul(w_stride, number(m))) for m in range(HEIGHT)]
        rows = [builder.add(x, builder.mul(x_stride, number(v))) for v in range(vectors)]
        before, loop = builder.block, builder.append_basic_block("products")
        after = builder.append_basic_block("sums")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_WORD)
        sums = [[builder.phi(_VECTOR) for _ in range(vectors)] for _ in range(HEIGHT)]
        at, x_at = builder.mul(k, number(4)), builder.mul(k, number(4 * LANES))
        held = [_load(builder, builder.add(row, x_at), _VECTOR) for row in rows]
        nexts = []
        for start, line in zip(starts, sums, strict=True):
            value = _spread(builder, _load(builder, builder.add(start, at), _FLOAT))
            nexts.append([builder.call(fma, [value, h, s]) for h, s in zip(held, line, strict=True)])
        more = builder.add(k, number(1))
        for phi, first, then in [(k, number(0), more)] + [
            (s, ir.Constant(_VECTOR, [0.0] * LANES), n)
            for line, new in zip(sums, nexts, strict=True)
            for s, n in zip(line, new, strict=True)
        ]:
            phi.add_incoming(first, before)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", more, count), loop, after)
        builder.position_at_end(after)
        for v in range(vectors):
            first = builder.add(out, builder.mul(out_stride, number(v * LANES)))
            _store(builder, [line[v] for line in nexts], first, out_stride)
        return context.get_dummy_value()

    return code


_SIGNATURE = types.void(*[types.int64] * 7)


@intrinsic
def multiply_one(typing, w, w_stride, x, x_stride, count, out, out_stride):
    """out [LANES, HEIGHT] = w [HEIGHT, K] times a tile of rows, x [K, LANES]; addresses, strides in bytes."""
    return _SIGNATURE, _tile(1)


@intrinsic
def multiply_two(typing, w, w_stride, x, x_stride, count, out, out_stride):
    """`multiply_one` for two vectors of rows, `x_stride` apart: out [2 LANES, HEIGHT]."""
    return _SIGNATURE, _tile(2)


def _lay_out(context, builder, sig, args):
    sources, offset, even, odd, step = args
    number = lambda n: ir.Constant(_WORD, n)
    rows = [_load(builder, builder.add(sources, number(8 * r)), _WORD) for r in range(LANES)]
    columns = [_load(builder, builder.add(row, offset), _VECTOR) for row in rows]
    half, place = LANES // 2, 1
    while place < LANES:
        pairs = [(columns[i], columns[i + half]) for i in range(half)]
        columns = [_zip(builder, *pair, first) for pair in pairs for first in (0, half)]
        place *= 2
    for k, column in enumerate(columns):
        address = builder.add(odd if k % 2 else even, builder.mul(step, number(k // 2)))
        builder.store(column, builder.inttoptr(address, _VECTOR.as_pointer()), align=4)
    return context.get_dummy_value()


@intrinsic
def lay_out(typing, sources, offset, even, odd, step):
    """Transpose LANES x LANES values, `offset` bytes into each of LANES rows whose addresses lie at `sources`: even
    columns go to `even` and every `step` bytes behind it, odd ones to `odd`."""
    return types.void(*[types.int64] * 5), _lay_out
