"""`generate` compiled ahead for one bucket of shapes: saved to a file, and loaded where nothing is to be compiled.

A program belongs to the model's structure (not its weights), to a kind of device and to a release of jaxlib; a file
says which, and is refused elsewhere. JAX keeps compiled code as a pickle: load only what you would run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from dsv4_jax.generate.api import Generation, Request, finish, generate_program
from dsv4_jax.generate.decode import Decoded
from dsv4_jax.generate.sampling import Greedy, Sample, Sampler
from dsv4_jax.model import DeepseekV4
from dsv4_jax.sharding import leaf_path

MAGIC = b"dsv4-program-1\n"
_compiled_before = itertools.count()
SAMPLERS = {"Greedy": Greedy, "Sample": Sample}  # those that a file can name


@dataclass(frozen=True)
class Bucket:
    """What a program is compiled for.

    rows: sequences of a call, exactly. prompt_tokens, max_new_tokens: the most of each, as asked; the program takes as
      many as fit the same bucket. sampler: its kind and which of its filters are set; their values are arguments.
    """

    rows: int
    prompt_tokens: int
    max_new_tokens: int
    sampler: Sampler
    drafts: int
    deterministic: bool

    def largest(self, model: DeepseekV4) -> Request:
        """The longest request."""
        tokens = np.zeros((self.rows, self.prompt_tokens), np.int32)
        return self.request(model, tokens, None, self.max_new_tokens, self.sampler, 0, ())

    def request(self, model: DeepseekV4, tokens, lengths, new, sampler, seed, stop_ids) -> Request:
        how = (seed, stop_ids, self.drafts, self.deterministic)
        return Request.make(model, tokens, lengths, new, sampler, *how)


@dataclass(frozen=True)
class Program:
    """`generate` for one `Bucket`; a call compiles nothing."""

    model: DeepseekV4
    bucket: Bucket
    compiled: jax.stages.Compiled
    payload: bytes = field(repr=False)  # the same, as it is saved

    def __call__(
        self,
        tokens,
        *,
        lengths=None,
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        seed: int | Sequence[int] = 0,
        stop_ids: Sequence[int] = (),
    ) -> Generation:
        """As `generate`; max_new_tokens and sampler are the bucket's by default.

        Raises:
          ValueError: as `generate`; or the request does not fit the bucket, with what does.
        """
        began, bucket = time.perf_counter(), self.bucket
        new = bucket.max_new_tokens if max_new_tokens is None else max_new_tokens
        sampler = bucket.sampler if sampler is None else sampler
        request, widest = bucket.request(self.model, tokens, lengths, new, sampler, seed, stop_ids), self._widest
        inputs, shapes = request.widened(widest.shapes.prompt), request.shapes
        fits = shapes.prompt <= widest.shapes.prompt and shapes.new <= widest.shapes.new
        if not fits or _kinds(inputs) != _kinds(widest.inputs):
            raise ValueError(
                f"this program takes {bucket.rows} prompts of up to {widest.shapes.prompt} tokens, gives up to "
                f"{widest.shapes.new} new ones, stops at up to 7 ids, and samples as {bucket.sampler!r} does; "
                "compile another for this request, or call generate"
            )
        out = self.compiled(request.parts(self.model)[1], *inputs)
        return finish(request, out, new, began)

    @functools.cached_property
    def _widest(self) -> Request:
        return self.bucket.largest(self.model)

    def save(self, path: str | Path) -> None:
        """Write the program to a file, by way of a temporary one.

        Raises:
          ValueError: its sampler is of a class of yours; or several processes share the mesh, each with a part of the
            program: give them a compilation cache instead.
        """
        if jax.process_count() > 1:
            raise ValueError("a program of several processes cannot be saved; use JAX_COMPILATION_CACHE_DIR instead")
        name = type(self.bucket.sampler).__name__
        if SAMPLERS.get(name) is not type(self.bucket.sampler):
            raise ValueError(f"{self.bucket.sampler!r} cannot be named in a file; choose one of {', '.join(SAMPLERS)}")
        fields = {k: v for k, v in vars(self.bucket.sampler).items() if v is not None}
        bucket = vars(self.bucket) | {"sampler": [name, {k: np.asarray(v).item() for k, v in fields.items()}]}
        about = json.dumps({"built": _built_for(self.model), "bucket": bucket}).encode()
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            unfinished.write_bytes(MAGIC + _digest(about, self.payload) + b"\n" + about + b"\n" + self.payload)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def compile_program(
    model: DeepseekV4,
    *,
    rows: int = 1,
    prompt_tokens: int,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    drafts: int = 0,
    deterministic: bool = False,
) -> Program:
    """Compile `generate` for `rows` prompts of up to `prompt_tokens` tokens; arguments otherwise as there."""
    sampler = Greedy() if sampler is None else sampler
    bucket = Bucket(rows, prompt_tokens, max_new_tokens, sampler, drafts, deterministic)
    widest = bucket.largest(model)
    lowered = generate_program.lower(*widest.parts(model), *widest.inputs, shapes=widest.shapes, **widest.how)
    compiled = _compile_anew(lowered)
    return Program(model, bucket, compiled, serialize_executable.serialize(compiled)[0])


def _compile_anew(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Without JAX's caches: what a CPU has read from files, or has run, cannot be written any more."""
    kept = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it asks for the setting once
    try:
        # In memory it keeps one for each lowering and its options; this one, of what XLA would dump, changes nothing.
        option: dict[str, Any] = {"xla_dump_max_hlo_modules": next(_compiled_before)}
        return lowered.compile(option)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def load_program(path: str | Path, model: DeepseekV4) -> Program:
    """Read what `Program.save` wrote, for a model of the same structure on the same kind of device.

    Raises:
      ValueError: not such a file, cut short, or built for something else: the message says what differs.
      OSError: it cannot be read.
    """
    magic, digest, about, payload = [*Path(path).read_bytes().split(b"\n", 3), b"", b"", b""][:4]
    if magic + b"\n" != MAGIC:
        raise ValueError(f"{path}: not a saved program; write one with dsv4_jax.compile_program(...).save(path)")
    if digest != _digest(about, payload):
        raise ValueError(f"{path}: damaged or cut short; write it again")
    found = json.loads(about)
    there, here = found["built"], _built_for(model)
    wrong = [f"{key} {there.get(key)!r}, not {value!r}" for key, value in here.items() if there.get(key) != value]
    if wrong:
        raise ValueError(f"{path}: built for another {'; another '.join(wrong)}; compile it anew here")
    name, fields = found["bucket"].pop("sampler")
    bucket = Bucket(**found["bucket"], sampler=SAMPLERS[name](**fields))
    widest = bucket.largest(model)
    inputs = jax.tree.structure(((widest.parts(model)[1], *widest.inputs), {}))
    outputs = jax.tree.structure(Decoded(*range(len(dataclasses.fields(Decoded)))))
    places = {"execution_devices": _devices(model)}
    compiled = serialize_executable.deserialize_and_load(payload, inputs, outputs, **places)
    return Program(model, bucket, compiled, payload)


def _digest(about: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(about + payload).hexdigest().encode()


def _kinds(inputs: tuple[Any, ...]) -> Any:
    """Structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(inputs)
    return structure, [(np.shape(x), np.result_type(x)) for x in leaves]


def _built_for(model: DeepseekV4) -> dict[str, Any]:
    """What a compiled program depends on besides its bucket."""
    leaves = [(leaf_path(k), x.shape, str(x.dtype)) for k, x in jax.tree_util.tree_leaves_with_path(model)]
    how = (model.config, model.max_tokens, model.dtype, model.kernels, model.numerics, model.cache_format)
    digest = hashlib.sha256(repr((how, leaves)).encode()).hexdigest()[:16]
    mesh, devices = model.parallel.mesh, _devices(model)
    sizes = {} if mesh is None else {str(name): size for name, size in mesh.shape.items()}
    device = {"device": devices[0].device_kind, "devices": len(devices), "mesh": sizes}
    return {"model": digest, **device, "jaxlib": jaxlib.version.__version__}


def _devices(model: DeepseekV4) -> list[jax.Device]:
    mesh = model.parallel.mesh
    return list(mesh.devices.flat) if isinstance(mesh, jax.sharding.Mesh) else list(jax.tree.leaves(model)[0].devices())
