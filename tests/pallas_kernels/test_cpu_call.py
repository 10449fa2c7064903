"""Offsets by which compiled functions read XLA's structures, against the header that is installed with jaxlib."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

from pallas_kernels import cpu_call

HEADER = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()


def fields(name: str) -> list[str]:
    """Names of a structure's fields, in order."""
    body = re.search(rf"struct {name} {{(.*?)\n}}", HEADER, re.DOTALL)[1]
    lines = [line.split("//")[0].strip() for line in body.splitlines()]
    named = [re.sub(r"_XLA_FFI_API_STRUCT_FIELD\((\w+)\)", r"\1", line.rstrip(";")) for line in lines if line]
    return [re.split(r"[ *]+", line)[-1] for line in named]


def words_before(name: str, field: str, sizes: dict[str, int]) -> int:
    """Words of 8 bytes in front of a field; fields of more than one are in `sizes`."""
    names = fields(name)
    return sum(sizes.get(f, 1) for f in names[: names.index(field)])


def test_a_frame():
    sizes = {"args": len(fields("XLA_FFI_Args")), "rets": len(fields("XLA_FFI_Rets"))}
    at = lambda field: words_before("XLA_FFI_CallFrame", field, sizes)
    inner = lambda name, field: words_before(name, field, {})
    assert cpu_call.FRAME == {
        "extension": at("extension_start"),
        "api": at("api"),
        "context": at("ctx"),
        "arguments": at("args") + inner("XLA_FFI_Args", "size"),
        "argument": at("args") + inner("XLA_FFI_Args", "args"),
        "results": at("rets") + inner("XLA_FFI_Rets", "size"),
        "result": at("rets") + inner("XLA_FFI_Rets", "rets"),
    }


def test_the_interface():
    sizes = {"api_version": 3}  # its own size, extension, and two 32-bit numbers
    at = lambda field: words_before("XLA_FFI_Api", field, sizes)
    version = at("api_version") + words_before("XLA_FFI_Api_Version", "major_version", {})
    schedule, threads = at("XLA_FFI_ThreadPool_Schedule"), at("XLA_FFI_ThreadPool_NumThreads")
    assert cpu_call.API == {"version": version, "schedule": schedule, "threads": threads}
    assert fields("XLA_FFI_ThreadPool_Schedule_Args")[2:] == ["ctx", "task", "data"]
    assert fields("XLA_FFI_ThreadPool_NumThreads_Args")[2:] == ["ctx", "num_threads"]
    assert re.search(r"#define XLA_FFI_API_MAJOR 0\n", HEADER)


def test_a_buffer():
    at = lambda field: words_before("XLA_FFI_Buffer", field, {})
    assert cpu_call.BUFFER == {"dtype": at("dtype"), "data": at("data"), "dims": at("dims")}


@pytest.mark.parametrize("name", ["F32", "BF16", "F8E4M3FN", "U8"])
def test_a_type(name: str):
    assert int(re.search(rf"XLA_FFI_DataType_{name} = (\d+)", HEADER)[1]) == getattr(cpu_call, name)
