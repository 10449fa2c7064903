"""The machine of `gpu_select.py` that emits code for a GPU."""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, math, nvvm, scf

from pallas_kernels.fp8_matmul.gpu_device import Word as Integer


def _i32(value):
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def _asm(result, operands, text: str, constraints: str):
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=True, asm_dialect=0)


class Word(Integer):
    """An i32, or a flag, of the compiler's."""

    def _compared(self, predicate, other) -> Word:
        return Word(arith.cmpi(predicate, self.value, _value(other)))

    def __or__(self, other):
        return self._with(arith.ori, other)

    def __lt__(self, other):
        return self._compared(arith.CmpIPredicate.slt, other)

    def __gt__(self, other):
        return self._compared(arith.CmpIPredicate.sgt, other)

    def __ge__(self, other):
        return self._compared(arith.CmpIPredicate.sge, other)


def _value(word):
    return word.value if isinstance(word, Word) else _i32(word)


class Memory:
    """Words from an address on: i32 in shared memory, i64 in global memory."""

    def __init__(self, start, is_shared: bool):
        self.start, self.is_shared = start, is_shared

    @classmethod
    def of(cls, ref, line: Word | int = 0) -> Memory:
        """From line `line` of a reference on."""
        is_shared = mgpu.utils.is_smem_ref(ref)
        kind = ir.IntegerType.get_signless(32 if is_shared else 64)
        start = llvm.ptrtoint(kind, mgpu.utils.memref_ptr(ref))
        strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
        words = Word(_value(line)) * strides[0]
        return cls(cls(start, is_shared).address(words), is_shared)

    @property
    def space(self) -> str:
        return "shared" if self.is_shared else "global"

    @property
    def constraint(self) -> str:
        return "r" if self.is_shared else "l"

    def address(self, index):
        offset = arith.muli(_value(index), _i32(4))
        return arith.addi(self.start, offset if self.is_shared else arith.extsi(self.start.type, offset))


class Warps:
    """The machine that emits code: each warp for itself, or with `exchange`, 32 words, all warps of the block.

    lane: this thread's in its warp; warp: its warp, in its warpgroup or in the block; below: the bits of lower lanes.
    """

    def __init__(self, warps: int = 1, exchange: Memory | None = None):
        thread = mgpu.utils.thread_idx()
        self.warps, self.exchange = warps, exchange
        self.lane = Word(arith.andi(thread, _i32(31)))
        warp = arith.shrui(thread, _i32(5))
        self.warp = Word(warp if exchange else arith.andi(warp, _i32(3)))
        self.below = self.bit(self.lane) + -1

    def word(self, value: int) -> Word:
        return Word(_i32(value))

    def bit(self, n) -> Word:
        return Word(arith.shli(_i32(1), _value(n)))

    def pick(self, flag: Word, one, other) -> Word:
        return Word(arith.select(flag.value, _value(one), _value(other)))

    def equal(self, a: Word, b) -> Word:
        return a._compared(arith.CmpIPredicate.eq, b)

    def differ(self, a: Word, b) -> Word:
        return a._compared(arith.CmpIPredicate.ne, b)

    def halve(self, a: Word) -> Word:
        """Its bits one place down, its sign among them."""
        return a >> 1

    def ones(self, word: Word) -> Word:
        return Word(math.ctpop(word.value))

    def count(self, flags: list[Word]) -> Word:
        """How many flags this lane has; in four sums, so that additions need not wait for each other."""
        sums: list[Any] = [_i32(0)] * min(4, len(flags))
        for n, flag in enumerate(flags):
            sums[n % len(sums)] = arith.addi(sums[n % len(sums)], arith.extui(_i32(0).type, flag.value))
        while len(sums) > 1:
            sums = [*sums[2:], arith.addi(sums[0], sums[1])]
        return Word(sums[0])

    def ballot(self, flag: Word) -> Word:
        kind = nvvm.VoteSyncKind.ballot
        return Word(nvvm.vote_sync(_i32(-1), flag.value, kind, results=[_i32(0).type]))

    def total(self, word: Word) -> Word:
        """The sum over all lanes of all warps."""
        return self.before(word)[1]

    def before(self, word: Word) -> tuple[Word, Word]:
        """The sums over the lanes of the warps before this one, and of all."""
        if self.exchange is None:
            return self.word(0), self._sum(word)
        self.store(self.exchange, self.warp, self._sum(word), self.equal(self.lane, 0))
        gpu.barrier()
        each = self.pick(self.lane < self.warps, self.load(self.exchange, self.lane), 0)
        sums = self._sum(self.pick(self.lane < self.warp, each, 0)), self._sum(each)
        gpu.barrier()
        return sums

    def _sum(self, word: Word) -> Word:
        return Word(mgpu.utils.redux(word.value, _i32(-1), mgpu.utils.ReductionKind.ADD))

    def loop(self, bound, carry: tuple[Word, ...], body) -> tuple[Word, ...]:
        @mgpu.utils.fori(_value(bound), [word.value for word in carry])
        def run(i, values):
            return [word.value for word in body(Word(i), tuple(map(Word, values)))]

        return tuple(map(Word, run.results))

    def repeat(self, carry: tuple[Word, ...], going, body) -> tuple[Word, ...]:
        """body(carry) while going(carry), which is the same in all lanes."""
        types = [word.value.type for word in carry]
        loop = scf.WhileOp(types, [word.value for word in carry])
        before, after = (region.blocks.append(*types) for region in (loop.before, loop.after))
        with ir.InsertionPoint(before):
            scf.condition(going(tuple(map(Word, before.arguments))).value, before.arguments)
        with ir.InsertionPoint(after):
            scf.yield_([word.value for word in body(tuple(map(Word, after.arguments)))])
        return tuple(map(Word, loop.results))

    def when(self, flag: Word, body) -> None:
        with mgpu.utils.when(flag.value):
            body()

    def load(self, memory: Memory, index) -> Word:
        text = f"ld.{memory.space}.b32 $0, [$1];"
        return Word(_asm(_i32(0).type, [memory.address(index)], text, f"=r,{memory.constraint}"))

    def store(self, memory: Memory, index, value, where: Word) -> None:
        text = f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.{memory.space}.b32 [$0], $1; }}"
        flag = arith.extui(_i32(0).type, where.value)
        _asm(None, [memory.address(index), _value(value), flag], text, f"{memory.constraint},r,r")

    def sync(self) -> None:
        """What lanes of a warp stored is seen by the others."""
        nvvm.bar_warp_sync(_i32(-1))
