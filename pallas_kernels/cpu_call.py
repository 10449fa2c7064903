"""Numba functions as XLA custom calls on a CPU: reading a call's buffers, and sharing its work among XLA's threads.

XLA hands a handler one address, of a call frame, and takes back the address of an error, or 0. Offsets here are words
of 8 bytes in the structures of XLA's foreign function interface, version 0 (`xla/ffi/api/c_api.h`, installed with
jaxlib, which `tests/pallas_kernels/test_cpu_call.py` reads). Everything is compiled, and needs no interpreter's lock.
"""

from __future__ import annotations

import ctypes
from typing import Any

import jax
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

FRAME = {"extension": 1, "api": 2, "context": 3, "arguments": 7, "argument": 9, "results": 12, "result": 14}
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _ARGUMENT, _RESULTS, _RESULT = FRAME.values()
API = {"version": 4, "schedule": 17, "threads": 18}
_VERSION, _SCHEDULE, _THREADS = API.values()
BUFFER = {"dtype": 2, "data": 3, "dims": 5}
_DTYPE, _DATA, _DIMS = BUFFER.values()
F32, BF16, F8E4M3FN, U8 = 11, 16, 20, 6  # XLA_FFI_DataType
JOB_WORDS = 5
_NEXT, _DONE, _HOLDERS, _TOTAL, _FRAME = range(JOB_WORDS)

_malloc = types.ExternalFunction("malloc", types.intp(types.intp))
_free = types.ExternalFunction("free", types.void(types.intp))
_WORD = ir.IntType(64)


@intrinsic
def as_pointer(typing, address):
    """int64 -> void*."""
    return types.voidptr(types.int64), lambda context, builder, sig, args: builder.inttoptr(
        args[0], context.get_value_type(types.voidptr)
    )


@intrinsic
def as_float(typing, bits):
    """The float32 with these bits."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def add(typing, address, value):
    """Add to the word at an address, as one action among all threads -> what it was."""

    def code(context, builder, sig, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _WORD.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), code


@intrinsic
def seen(typing, address):
    """The word at an address as other threads left it."""

    def code(context, builder, sig, args):
        return builder.load_atomic(builder.inttoptr(args[0], _WORD.as_pointer()), "acquire", 8)

    return types.int64(types.int64), code


@intrinsic
def _call(typing, function, argument):
    """Call the C function at an address with one word."""

    def code(context, builder, sig, args):
        kind = ir.FunctionType(_WORD, [_WORD])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])

    return types.int64(types.int64, types.int64), code


@intrinsic(prefer_literal=True)
def address_of(typing, name):
    """The address of a function told to `name_task`; by name, so that a compiled caller can be kept on disk."""

    def code(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [_WORD])
        function = cgutils.get_or_insert_function(builder.module, kind, name.literal_value)
        return builder.ptrtoint(function, _WORD)

    return types.int64(name), code


@njit
def word(address, i):
    return carray(as_pointer(address + 8 * i), (1,), np.int64)[0]


@njit
def set_word(address, i, value):
    carray(as_pointer(address + 8 * i), (1,), np.int64)[0] = value


@njit
def arguments(frame):
    """How many there are."""
    return word(frame, _ARGUMENTS)


@njit
def results(frame):
    return word(frame, _RESULTS)


@njit
def argument(frame, i):
    """The address of a buffer's description; see `data`, `dtype` and `dim`."""
    return word(word(frame, _ARGUMENT), i)


@njit
def result(frame, i):
    return word(word(frame, _RESULT), i)


@njit
def data(buffer):
    return word(buffer, _DATA)


@njit
def dtype(buffer):
    return word(buffer, _DTYPE) & 0xFFFFFFFF


@njit
def dim(buffer, axis):
    return word(word(buffer, _DIMS), axis)


@njit
def is_question(frame):
    """Whether XLA only asks for which version of its interface this is: then it is answered."""
    extension = word(frame, _EXTENSION)
    if extension == 0:
        return False
    metadata, version = word(extension, 3), word(word(frame, _API), _VERSION)
    if version & 0xFFFFFFFF == 0:  # major version; minor ones add fields behind those read here
        set_word(metadata, 3, version)
    return True


@njit
def claim(job):
    """The next unit of a job, or -1."""
    unit = add(job + 8 * _NEXT, 1)
    return unit if unit < word(job, _TOTAL) else -1


@njit
def frame_of(job):
    return word(job, _FRAME)


@njit
def finish(job):
    """A unit is done."""
    add(job + 8 * _DONE, 1)


@njit
def leave(job):
    """This thread is through with a job; the last one frees it."""
    if add(job + 8 * _HOLDERS, -1) == 1:
        _free(job)


@njit
def notes(job):
    """The address of words that a job carries besides."""
    return job + 8 * JOB_WORDS


@njit
def set_total(job, total):
    """How many units a job has, if that was not known; before anybody is asked for help."""
    set_word(job, _TOTAL, total)


@njit
def open_job(frame, total, notes):
    """A job of `total` units, claimed one by one by whichever thread has time, with `notes` words besides."""
    job = _malloc(8 * (JOB_WORDS + notes))
    set_word(job, _NEXT, 0)
    set_word(job, _DONE, 0)
    set_word(job, _HOLDERS, 1)
    set_word(job, _TOTAL, total)
    set_word(job, _FRAME, frame)
    return job


@njit
def ask_for_help(job, task):
    """Have XLA's other threads, as many as there are units for, call `task` with the job when they have time.

    One that comes late finds nothing to claim: nobody waits for it, so calls that wait for each other cannot.
    """
    frame = frame_of(job)
    api, context = word(frame, _API), word(frame, _CONTEXT)
    request, threads = np.zeros(5, np.int64), np.zeros(1, np.int64)
    request[0], request[2], request[3] = 32, context, threads.ctypes.data
    if _call(word(api, _THREADS), request.ctypes.data) != 0:
        return
    request[0], request[3], request[4] = 40, task, job
    for _ in range(min(threads[0], word(job, _TOTAL)) - 1):
        add(job + 8 * _HOLDERS, 1)
        if _call(word(api, _SCHEDULE), request.ctypes.data) != 0:
            add(job + 8 * _HOLDERS, -1)


@njit
def wait_for(job, units):
    """Until so many are done."""
    while seen(job + 8 * _DONE) < units:
        pass


@njit
def wait(job):
    """Until every unit that any thread claimed is done."""
    wait_for(job, word(job, _TOTAL))


def name_task(name: str, task: Any) -> None:
    """Make a compiled function known by `name` to `address_of`; before anything that asks for it is compiled."""
    llvm.add_symbol(name, task.address)


def register(name: str, handler: Any) -> None:
    """Make a compiled handler a target of `jax.ffi.ffi_call`."""
    call = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(handler.address)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(call), platform="cpu")
