"""A whole PTX kernel on arrays, as far as the selection and widening of index keys go: one block, warps in step.

Branches must be the same for all lanes of a warp. Warps run one after the other between barriers, in a given order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import ptx

LANES = 32
COMPARE = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
# What has no effect where nothing is asynchronous, and the copy of a tile that a test reads where it lies
SKIPPED = ("fence", "mbarrier.init", "elect.sync", "bar.warp.sync", "cp.async.commit", "cp.async.wait", "cp.async.bulk")


def parse(text: str) -> tuple[list[tuple[str, str, list[str]]], dict[str, int]]:
    """Instructions as (guard, name, operands), and the places of labels."""
    body = text[text.index("{", text.index(".entry")) + 1 : text.rindex("}")]
    body = re.sub(r"//.*|^\s*\.(loc|file).*$", "", body, flags=re.MULTILINE)
    code, labels = [], {}
    # Braces of a block of inline code go; those of operands have no space after them.
    for part in re.split(r";|(?<=:)\s*\n|\{\s|\s\}", body):
        part = " ".join(part.split())
        while label := re.match(r"(\$\w+):\s*", part):
            labels[label[1]] = len(code)
            part = part[label.end() :]
        if not part or part[0] in ".})":
            continue
        guard, rest = (part.split(" ", 1)) if part[0] == "@" else ("", part)
        name, _, operands = rest.partition(" ")
        code.append((guard, name, [x for x in re.split(r"[\s,|{}]+", operands) if x]))
    return code, labels


class Block:
    """A thread block: memories, byte arrays, are the kernel's parameters; shared is its dynamic shared memory."""

    def __init__(self, text: str, threads: int, memories: list[np.ndarray], shared: int, block: int = 0):
        self.code, self.labels = parse(text)
        self.memories, self.block, self.warps = memories, block, threads // LANES
        self.shared = np.zeros(shared, np.uint8)

    def run(self, order: int = 1) -> Block:
        """To the end; order -1: the last warp goes first."""
        warps = [Warp(self, n).run() for n in range(self.warps)]
        going = [True] * self.warps
        while any(going):
            for n in range(self.warps)[::order]:
                going[n] = next(warps[n], None) is not None
            assert all(going) or not any(going), "some warps wait for others that have ended"
        return self

    def bytes_at(self, address: int, space: str) -> tuple[np.ndarray, int]:
        if space == "shared":
            return self.shared, address
        return self.memories[(address >> 40) - 1], address & (1 << 40) - 1


class Warp:
    def __init__(self, block: Block, number: int):
        self.block = block
        thread = np.arange(LANES, dtype=np.uint64) + np.uint64(number * LANES)
        self.values = {"%tid.x": thread, "%ctaid.x": self.same(block.block), "__dynamic_shmem__0": self.same(0)}

    def same(self, value: int) -> np.ndarray:
        return np.full(LANES, value % 2**64, np.uint64)

    def read(self, name: str) -> np.ndarray:
        if name.strip("[]") in self.values:
            return self.values[name.strip("[]")]
        if found := re.search(r"_param_(\d+)", name):
            return self.same((int(found[1]) + 1) << 40)
        if found := re.fullmatch(r"\[(\S+)\s*\+\s*(\d+)\]", name):
            return self.values[found[1]] + np.uint64(int(found[2]))
        return self.same(int(name, 0))

    def run(self) -> Iterator[bool]:
        at = 0
        while at < len(self.block.code):
            guard, name, operands = self.block.code[at]
            at += 1
            live = self.values[guard.lstrip("@!")] if guard else np.ones(LANES, bool)
            live = ~live if guard.startswith("@!") else live
            if name.startswith("bra"):
                assert live.all() or not live.any(), "lanes part"
                at = self.block.labels[operands[0]] if live.all() else at
            elif name == "ret":
                return
            elif name == "bar.sync":
                yield True
            elif name.startswith("elect.sync"):
                self.values[operands[1]] = np.arange(LANES) == 0
            elif not name.startswith(SKIPPED):
                self.step(name, operands, live)

    def step(self, name: str, operands: list[str], live: np.ndarray) -> None:
        op, *kinds = name.split(".")
        if op in ("ld", "st"):
            return self.move(op, kinds, operands, live)
        if op == "cp":
            return self.copy(operands, live)
        assert live.all(), name
        self.values[operands[0]] = self.result(op, kinds, name, [self.read(x) for x in operands[1:]])

    def result(self, op: str, kinds: list[str], name: str, x: list[np.ndarray]):
        kind = kinds[-1]
        bits = 64 if kind.endswith("64") else 32
        mask = np.uint64(2**bits - 1)
        if kind == "pred":
            return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}[op](*x)
        if op == "setp":
            a, b = (signed(v, bits) if kind[0] == "s" else v & mask for v in x)
            return getattr(np, COMPARE[kinds[0]])(a, b)
        if op == "selp":
            return np.where(x[2], x[0], x[1])
        if op == "cvt":  # cvt.to.from
            return signed(x[0], 32).astype(np.uint64) if kind == "s32" else x[0] & np.uint64(2**32 - 1)
        if op == "cvta":
            return x[0]
        if op == "mov":
            return x[0] & mask
        if op in ("min", "max"):
            a, b = signed(x[0], bits), signed(x[1], bits)
            return (np.minimum if op == "min" else np.maximum)(a, b).astype(np.uint64) & mask
        if op in ("shl", "shr"):
            value, count = x[0] & mask, x[1]
            moved = value << count if op == "shl" else value >> count
            return np.where(count < bits, moved & mask, np.uint64(0))
        if op == "mad":
            return x[0] * x[1] + x[2] if "wide" in kinds else (x[0] * x[1] + x[2]) & mask
        if op == "mul" and "wide" in kinds:
            return x[0] * x[1]
        if op == "prmt" or "bf16x2" in kinds:
            *words, last = (v.astype(np.uint32) for v in x)
            return ptx.OPS[name](*words, last[0] if op == "prmt" else last).astype(np.uint64)
        if op in ("vote", "redux", "shfl"):
            return self.together(op, x)
        if op == "popc":
            return np.bitwise_count(x[0] & mask).astype(np.uint64)
        functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
                     "xor": np.bitwise_xor, "not": np.invert}  # fmt: skip
        return functions[op](*x) & mask

    def together(self, op: str, x: list[np.ndarray]):
        if op == "vote":
            return self.same(sum(1 << n for n in range(LANES) if x[0][n]))
        if op == "redux":
            return self.same(int(x[0].sum()) % 2**32)
        return x[0][x[1].astype(int)]

    def move(self, op: str, kinds: list[str], operands: list[str], live: np.ndarray) -> None:
        if kinds[0] == "param":
            self.values[operands[0]] = self.read(operands[1])
            return
        where = next(n for n, x in enumerate(operands) if x.startswith("["))
        names = [x for n, x in enumerate(operands) if n != where]
        address = self.read(operands[where])
        for word, name in enumerate(names):
            value = np.array(self.read(name) if op == "st" or name in self.values else self.same(0))
            for lane in np.flatnonzero(live):
                memory, start = self.block.bytes_at(int(address[lane]) + 4 * word, kinds[0])
                assert start % 4 == 0 and 0 <= start <= memory.size - 4, (op, kinds, start)
                here = memory[start : start + 4].view(np.uint32)
                if op == "ld":
                    value[lane] = here[0]
                else:
                    here[0] = value[lane] & np.uint64(0xFFFFFFFF)
            if op == "ld":
                self.values[name] = value

    def copy(self, operands: list[str], live: np.ndarray) -> None:
        target, source, wanted = (self.read(operands[n]) for n in (0, 1, 3))
        size = int(operands[2])
        for lane in np.flatnonzero(live):
            memory, start = self.block.bytes_at(int(source[lane]), "global")
            count, place = int(wanted[lane]), int(target[lane])
            assert place % size == 0 and place + size <= self.block.shared.size
            assert not count or (start % size == 0 and start + count <= memory.size)
            self.block.shared[place : place + size] = 0
            self.block.shared[place : place + count] = memory[start : start + count]


def signed(value: np.ndarray, bits: int) -> np.ndarray:
    return value.astype(np.uint32).view(np.int32).astype(np.int64) if bits == 32 else value.view(np.int64)
