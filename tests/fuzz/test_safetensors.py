"""Malformed files against the safetensors reader: an error that names the file, and no crash, hang or large allocation.

3,000 inputs of each kind; DSV4_FULL_TESTS=1 makes it 70,000, 210,000 in all.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints.errors import CheckpointError
from checkpoints.shards import DTYPES, INDEX, ShardReader, make_header

pytestmark = pytest.mark.slow

INPUTS = 70_000 if os.environ.get("DSV4_FULL_TESTS") else 3_000
SECONDS = 2.0  # of processor time for one small file; a thousand times what it takes
# What parsed JSON and error messages take per byte of a file, at most; a claimed size is another order of magnitude.
BYTES_PER_BYTE, SPARE_BYTES = 300, 256 << 10

VALID = {"embed": ("BF16", (4, 3)), "a.weight": ("F8_E4M3", (5,)), "a.scale": ("F8_E8M0", ()), "none": ("I64", (0, 2))}
HEADER = make_header(VALID)
FILE = HEADER + bytes(range(4 * 3 * 2 + 5 + 1))

fuzz = settings(max_examples=INPUTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
numbers = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 10**400]),
    st.sampled_from([True, False, None, 1.0, 1e308, float("inf"), float("nan"), "4", [], {}]),
)
dimensions = st.one_of(st.lists(numbers, max_size=4), st.lists(st.integers(0, 3), max_size=70), numbers)
names = st.one_of(
    st.sampled_from([*VALID, "__metadata__", "", "\ud800", "a\nb", "\x00", "x" * 300]), st.text(max_size=8)
)
dtypes = st.one_of(st.sampled_from([*DTYPES, "F4", "f32", "", "F8_E5M2"]), numbers)


@st.composite
def consistent(draw) -> dict:
    """An entry whose offsets may well fit."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    begin = draw(st.integers(0, 12))
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + math.prod(shape) * DTYPES[dtype].itemsize]}


odd = st.fixed_dictionaries(
    {}, optional={"dtype": dtypes, "shape": dimensions, "data_offsets": dimensions, "more": numbers}
)
headers = st.dictionaries(names, st.one_of(consistent(), odd, numbers), max_size=4)


@st.composite
def built(draw) -> bytes:
    """A file with a JSON header of any content, its length right or not, and any data."""
    text = json.dumps(draw(headers)).encode()
    text += b" " * draw(st.integers(0, 9))
    length = draw(st.one_of(st.just(len(text)), st.integers(0, 2**64 - 1), st.integers(0, len(text) + 9)))
    return length.to_bytes(8, "little") + text + draw(st.binary(max_size=64))


@st.composite
def mutated(draw) -> bytes:
    """A valid file with bytes changed, cut out, put in or doubled."""
    content = bytearray(FILE)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, max(len(content) - 1, 0)))
        end = min(begin + draw(st.integers(1, 24)), len(content))
        kind = draw(st.sampled_from(["set", "cut", "insert", "double", "end"]))
        if kind == "set" and content:
            content[begin] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[begin:end]
        elif kind == "insert":
            content[begin:begin] = draw(st.one_of(st.binary(max_size=12), st.sampled_from([b"[" * 3000, b"9" * 5000])))
        elif kind == "double":
            content[begin:begin] = content[begin:end]
        else:
            del content[begin:]
    return bytes(content)


weight_maps = st.one_of(
    st.dictionaries(names, st.one_of(st.sampled_from(["m.safetensors", "../m", "/etc/passwd", ""]), numbers)),
    st.just({name: "m.safetensors" for name in VALID}),
    numbers,
)
indices = st.one_of(
    st.builds(lambda value: json.dumps({"weight_map": value}).encode(), weight_maps),
    st.builds(lambda value: json.dumps(value).encode(), weight_maps),
    st.binary(max_size=40),
    st.sampled_from([b"[" * 100_000, b'{"weight_map": ' * 5000, b"9" * 10_000]),
)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """On a memory file system where there is one: a disk would take most of the time."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="dsv4-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


def read_all(directory: Path, size: int) -> None:
    """Open and read everything, or CheckpointError; within bounds of time and memory."""
    gc.disable()  # a collection would walk over all that hypothesis holds
    tracemalloc.start()
    began = time.thread_time()
    try:
        reader = ShardReader(directory)
        arrays = {name: reader.read(name) for name in reader.tensors}
    except CheckpointError as error:
        assert "m.safetensors" in str(error) or INDEX in str(error)
        str(error).encode()  # can be printed
    else:
        for name, array in arrays.items():
            info = reader.tensors[name]
            assert (array.dtype, array.shape) == (DTYPES[info.dtype], info.shape)
            content = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
            assert np.ascontiguousarray(array).tobytes() == content and not (array.size and array.flags.writeable)
    finally:
        seconds = time.thread_time() - began
        gc.enable()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seconds < SECONDS
    assert peak <= BYTES_PER_BYTE * size + SPARE_BYTES, f"{peak} bytes for a file of {size}"


@fuzz
@given(content=st.one_of(mutated(), st.binary(max_size=200)))
def test_damaged_file(content, directory):
    (directory / INDEX).unlink(missing_ok=True)
    (directory / "m.safetensors").write_bytes(content)
    read_all(directory, len(content))


@fuzz
@given(content=built())
def test_file_with_any_header(content, directory):
    (directory / INDEX).unlink(missing_ok=True)
    (directory / "m.safetensors").write_bytes(content)
    read_all(directory, len(content))


@fuzz
@given(index=indices, content=st.one_of(st.just(FILE), mutated()))
def test_any_index(index, content, directory):
    (directory / "m.safetensors").write_bytes(content)
    (directory / INDEX).write_bytes(index)
    read_all(directory, len(content) + len(index))
