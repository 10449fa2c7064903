"""Platform strategies: what the maths of attention and experts asks of a platform, chosen once when the model is built.

A strategy is frozen and hashable, so it travels with a module's structure, not with its arrays.
"""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.experts import MAX_BLOCK_ROWS, as_one, expert_mlp, expert_mlp_in_blocks, hidden, multiply_blocks
from dsv4_jax.gradients import differentiable
from dsv4_jax.linear import linear, matmul
from dsv4_jax.numerics import Numerics
from dsv4_jax.quantized import QuantizedArray, Stack, Weight, dequantize
from dsv4_jax.rope import Rotation, apply_rope
from dsv4_jax.streams import collapse, expand
from pallas_kernels.chips import Chip, chip, chip_of, require
from pallas_kernels.compressor_pool import pool_window, pool_window_tpu
from pallas_kernels.expert_matmul.tpu import expert_matmul_tpu
from pallas_kernels.expert_rows import add_rows, add_rows_tpu, expert_hidden, expert_hidden_tpu
from pallas_kernels.fp8_matmul.reference import BLOCK as FP8_BLOCK
from pallas_kernels.fp8_matmul.tpu import fp8_matmul_tpu, fp8_matmuls_tpu, grouped_output_projection_tpu
from pallas_kernels.head_norm import norm_heads, norm_heads_tpu
from pallas_kernels.hyper_connection import collapse as plain_collapse
from pallas_kernels.hyper_connection import collapse_tpu, expand_tpu
from pallas_kernels.hyper_connection import expand as plain_expand
from pallas_kernels.index_rows import Fp4Rows, dequantize_index_rows
from pallas_kernels.index_topk import pick_entries_xla
from pallas_kernels.index_topk.tpu import index_topk_tpu
from pallas_kernels.index_topk.tuning import DECODE_TOKENS
from pallas_kernels.mask_bits import LANES
from pallas_kernels.put_rows import put_rows, put_rows_tpu
from pallas_kernels.put_rows.tpu import MOST as MOST_PUT
from pallas_kernels.rms_norm import rms_norm, rms_norm_tpu
from pallas_kernels.round_index import encode_index, encode_index_tpu, rotated_index, round_index_tpu
from pallas_kernels.round_rows import round_rows, round_rows_tpu
from pallas_kernels.routing import ExpertRows, arrange_pairs, arrange_pairs_tpu, route, route_tpu
from pallas_kernels.sparse_mla import Picks, Window, sparse_mla_xla
from pallas_kernels.sparse_mla.tpu import sparse_mla_tpu
from pallas_kernels.store_rows import store_rows, store_rows_tpu
from pallas_kernels.store_rows.tpu import is_whole

IndexKeys = jax.Array | Fp4Rows | QuantizedArray  # [B, N, D]
SUBLANES = 8  # rows of a tile of 32-bit values on a TPU
MASK_LIMIT = 16  # entries per pick up to which a TPU reads all of them under a mask; beyond, picked rows are gathered


class NormKernels(abc.ABC):
    """What a platform must supply for norms."""

    @abc.abstractmethod
    def rms_norm(self, x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
        """See `pallas_kernels.rms_norm.reference.rms_norm`."""


class AttentionKernels(NormKernels):
    """What a platform must supply; every implementation keeps the contract of the reference it names."""

    one_device = False  # XLA cannot share its calls out over a mesh
    has_streams = False  # lanes of the schedule are streams of the device
    prefill_chunk = 512  # tokens of a prompt that go through the model at a time
    loops_over_layers = False  # a prompt goes round a loop over layers of a kind, so that they are compiled once
    pools_rings = False  # entries of short steps come from `pool_window`, out of rings that hold the step already
    reads_packed = True  # its kernels expand quantised weights tile by tile, so nobody should do so beforehand

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name it is asked for by."""

    @abc.abstractmethod
    def padded_heads(self, heads: int) -> int:
        """Query heads the kernel wants (>= heads); padded heads have zero queries and a sink of -inf."""

    @abc.abstractmethod
    def project(self, x: jax.Array, w: Weight) -> jax.Array:
        """x [..., K] times w [N, K] -> [..., N] in x.dtype; see `linear.linear`."""

    def project_each(self, x: jax.Array, *weights: Weight) -> tuple[jax.Array, ...]:
        """`project` of the same x with each weight; one kernel, where a platform gains by it."""
        return tuple(self.project(x, w) for w in weights)

    def matmul_each(self, x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
        """x [..., K] times each unquantised w [N, K] -> fp32 [..., N]; see `linear.matmul`."""
        return tuple(matmul(x, w) for w in weights)

    @abc.abstractmethod
    def norm_heads(self, q: jax.Array, rotation: Rotation, eps: float) -> jax.Array:
        """Queries [B, T, H, D], rotation [B, T, R / 2]; see `pallas_kernels.head_norm.reference.norm_heads`."""

    @abc.abstractmethod
    def output_projection(
        self, o: jax.Array, rotation: Rotation, o_a: Weight, o_b: Weight, groups: int, numerics: Numerics
    ) -> jax.Array:
        """Inverse RoPE, grouped low-rank projection, projection back: [B, T, H, D] -> [B, T, M] in o.dtype.

        What goes into o_a is never rounded, what goes into o_b is as `numerics` says.
        """

    @abc.abstractmethod
    def sparse_mla(self, q, positions, window: Window, entries, picks: Picks | None, sinks, *, scale: float):
        """See `pallas_kernels.sparse_mla.reference.sparse_mla`."""

    @abc.abstractmethod
    def store_rows(self, rows: jax.Array, weight: jax.Array, rotation: Rotation, eps: float, *, wide: bool = False):
        """KV rows [B, T, D], rotation [B, T, R / 2]; see `pallas_kernels.store_rows.reference.store_rows`."""

    @abc.abstractmethod
    def put_rows(self, held, rows, index: jax.Array):
        """See `pallas_kernels.put_rows.reference.put_rows`."""

    @abc.abstractmethod
    def pool_window(self, kv, gate, start, end, *, ratio: int, overlap: bool, dtype) -> jax.Array:
        """See `pallas_kernels.compressor_pool.reference.pool_window`."""

    @abc.abstractmethod
    def pick_entries(self, q, weights, keys: IndexKeys, visible, *, top_k: int) -> Picks:
        """See `pallas_kernels.index_topk.reference.pick_entries`; keys may be held in 8 or 4 bits."""


class ExpertKernels(abc.ABC):
    """What a platform must supply for routing and for the experts."""

    most_block_rows = MAX_BLOCK_ROWS  # of a grouped product's blocks

    @abc.abstractmethod
    def route(self, scores, bias, *, top_k: int, factor: float) -> tuple[jax.Array, jax.Array]:
        """See `pallas_kernels.routing.reference.route`."""

    @abc.abstractmethod
    def expert_hidden(
        self, both: jax.Array, weights: jax.Array | None, limit: float, numerics: Numerics, down: Weight
    ) -> jax.Array:
        """See `experts.hidden`."""

    @abc.abstractmethod
    def expert_mlp(
        self, x, index, weights, gate_up: Weight, down: Weight, limit: float, numerics: Numerics, routed: int | None
    ):
        """See `experts.expert_mlp`."""


class StreamKernels(abc.ABC):
    """What a platform must supply for hyper-connections."""

    @abc.abstractmethod
    def collapse_streams(self, streams, fn, base, scale, norm=None, *, iterations: int, eps: float, rms_eps: float):
        """Streams [B, T, N, M] -> [B, T, M], and the mixing weights; see `streams.collapse`.

        norm: fp32 [M], weight of an RMSNorm of the former; None: there is none.
        """

    @abc.abstractmethod
    def expand_streams(self, out, streams, mixing) -> jax.Array:
        """See `streams.expand`; mixing is what `collapse_streams` gave."""


class RoundingKernels(abc.ABC):
    """What a platform must supply for the numerics."""

    @abc.abstractmethod
    def round_rows(self, x: jax.Array) -> jax.Array:
        """See `pallas_kernels.round_rows.reference.round_rows`."""

    @abc.abstractmethod
    def encode_index(self, x: jax.Array, rotation: Rotation) -> Fp4Rows:
        """Keys [..., D], rotation [..., R / 2]; see `pallas_kernels.round_index.reference.encode_index`."""

    @abc.abstractmethod
    def rotated_index(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        """x [..., D], rotation [..., R / 2]; see `pallas_kernels.round_index.reference.rotated_index`."""


class Kernels(AttentionKernels, ExpertKernels, StreamKernels, RoundingKernels):
    """A whole platform."""


@dataclass(frozen=True)
class XlaKernels(Kernels):
    """Portable: whatever XLA compiles for, it runs on."""

    name = "xla"
    reads_packed = False

    def padded_heads(self, heads: int) -> int:
        return heads

    def project(self, x: jax.Array, w: Weight) -> jax.Array:
        return linear(x, w)

    def round_rows(self, x: jax.Array) -> jax.Array:
        return round_rows(x)

    def rotated_index(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        return rotated_index(x, rotation.cos, rotation.sin)

    def encode_index(self, x: jax.Array, rotation: Rotation) -> Fp4Rows:
        return encode_index(x, rotation.cos, rotation.sin)

    def rms_norm(self, x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
        return rms_norm(x, weight, eps=eps)

    def norm_heads(self, q: jax.Array, rotation: Rotation, eps: float) -> jax.Array:
        return norm_heads(q, rotation.cos, rotation.sin, eps=eps)

    def store_rows(self, rows: jax.Array, weight: jax.Array, rotation: Rotation, eps: float, *, wide: bool = False):
        return store_rows(rows, weight, rotation.cos, rotation.sin, eps=eps, wide=wide)

    def output_projection(
        self, o: jax.Array, rotation: Rotation, o_a: Weight, o_b: Weight, groups: int, numerics: Numerics
    ) -> jax.Array:
        return linear(numerics.activations(grouped_output(o, rotation, o_a, groups), o_b), o_b)

    def sparse_mla(self, q, positions, window: Window, entries, picks: Picks | None, sinks, *, scale: float):
        return sparse_mla_xla(q, positions, window, entries, picks, sinks, scale=scale)

    def put_rows(self, held, rows, index: jax.Array):
        return put_rows(held, rows, index)

    def pool_window(self, kv, gate, start, end, *, ratio: int, overlap: bool, dtype) -> jax.Array:
        return pool_window(kv, gate, start, end, ratio=ratio, overlap=overlap, dtype=dtype)

    def pick_entries(self, q, weights, keys: IndexKeys, visible, *, top_k: int) -> Picks:
        return pick_entries_xla(q, weights, wide_keys(keys, q.dtype), visible, top_k=top_k)

    def collapse_streams(self, streams, fn, base, scale, norm=None, *, iterations: int, eps: float, rms_eps: float):
        sizes: dict[str, Any] = {"iterations": iterations, "eps": eps, "rms_eps": rms_eps}
        x, *mixing = collapse(streams, fn, base, scale, product=lambda x, w: self.matmul_each(x, w)[0], **sizes)
        return x if norm is None else rms_norm(x, norm, eps=rms_eps), tuple(mixing)

    def expand_streams(self, out, streams, mixing) -> jax.Array:
        return expand(out, streams, *mixing)

    def expert_mlp(self, x, index, weights, gate_up, down, limit, numerics, routed=None):
        return expert_mlp(x, index, weights, gate_up, down, limit, numerics, routed)

    def route(self, scores, bias, *, top_k: int, factor: float) -> tuple[jax.Array, jax.Array]:
        return route(scores, bias, top_k=top_k, factor=factor)

    def expert_product(self, x, row, expert, used, w: Weight) -> jax.Array:
        """This and the next three are what `experts.expert_mlp_in_blocks` asks for."""
        return multiply_blocks(x, row, expert, used, w)

    def arrange_pairs(self, index, weights, *, experts: int, rows: int, multiple: int) -> ExpertRows:
        return arrange_pairs(index, weights, experts=experts, rows=rows, multiple=multiple)

    def expert_hidden(self, both, weights, limit: float, numerics: Numerics, down: Weight) -> jax.Array:
        return hidden(both, weights, limit, numerics, down)

    def add_rows(self, products: jax.Array, place: jax.Array) -> jax.Array:
        return add_rows(products, place)


def grouped_output(o: jax.Array, rotation: Rotation, o_a: Weight, groups: int) -> jax.Array:
    """Rotate o [B, T, H, D] back and project each group of heads with its rows of o_a: -> [B, T, G * rank]."""
    B, T, H, D = o.shape
    o = apply_rope(o, jax.tree.map(lambda table: table[:, :, None], rotation), inverse=True)
    rows = jnp.moveaxis(o.reshape(B * T, groups, -1), 1, 0)
    held: Any = o_a.data if isinstance(o_a, QuantizedArray) else o_a
    if B * T == 1 and isinstance(held, Stack):  # a batched product of one row each is not a matrix-vector product
        return jnp.concatenate([linear(x, w) for x, w in zip(rows, held.each, strict=True)], -1).reshape(B, T, -1)
    w = dequantize(o_a, o.dtype).reshape(groups, -1, H // groups * D)
    precision = jax.lax.Precision.HIGHEST if o.dtype == jnp.float32 else None
    parts = jnp.einsum("GTK,GRK->GTR", rows, w, precision=precision, preferred_element_type=jnp.float32)
    return jnp.moveaxis(parts.astype(o.dtype), 0, 1).reshape(B, T, -1)


@dataclass(frozen=True)
class TpuKernels(XlaKernels):
    """Mosaic kernels for TPU. Products with unquantised weights are XLA's, which has the matrix unit to itself there.

    chip: what to compile for. interpret: run the kernels on CPU, for tests; `True` is the quick interpreter.
    """

    chip: Chip
    interpret: bool | pltpu.InterpretParams = False

    name = "tpu"
    prefill_chunk = 2048
    loops_over_layers = True
    pools_rings = True
    reads_packed = True

    def __post_init__(self):
        require(self.chip, "kernels='tpu'", platform="tpu")

    @property
    def _options(self) -> dict[str, Any]:
        return {"chip": self.chip, "interpret": self.interpret}

    def project(self, x: jax.Array, w: Weight) -> jax.Array:
        if not is_fp8(w):
            return linear(x, w)
        kernel = lambda x, w: fp8_matmul_tpu(x, w.data, w.scale, **self._options)
        return differentiable(kernel, linear, x, w)

    def project_each(self, x: jax.Array, *weights: Weight) -> tuple[jax.Array, ...]:
        if not all(is_fp8(w) for w in weights):
            return super().project_each(x, *weights)
        kernel = lambda x, *w: tuple(fp8_matmuls_tpu(x, [(each.data, each.scale) for each in w], **self._options))
        plain = lambda x, *w: tuple(linear(x, each) for each in w)
        return differentiable(kernel, plain, x, *weights)

    def round_rows(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] % LANES:  # of a model smaller than the published
            return round_rows(x)
        return differentiable(functools.partial(round_rows_tpu, **self._options), round_rows, x)

    def rotated_index(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        args = x, rotation.cos, rotation.sin
        if x.shape[-1] != LANES or 2 * rotation.cos.shape[-1] > LANES:  # of a model smaller than the published
            return rotated_index(*args)
        return differentiable(functools.partial(round_index_tpu, **self._options), rotated_index, *args)

    def encode_index(self, x: jax.Array, rotation: Rotation) -> Fp4Rows:
        args = x, rotation.cos, rotation.sin
        if x.shape[-1] != LANES or 2 * rotation.cos.shape[-1] > LANES:
            return encode_index(*args)
        return encode_index_tpu(*jax.lax.stop_gradient(args), **self._options)  # a code has no gradient

    def rms_norm(self, x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
        plain = functools.partial(rms_norm, eps=eps)
        if x.shape[-1] % LANES:
            return plain(x, weight)
        return differentiable(functools.partial(rms_norm_tpu, eps=eps, **self._options), plain, x, weight)

    def store_rows(self, rows: jax.Array, weight: jax.Array, rotation: Rotation, eps: float, *, wide: bool = False):
        plain = functools.partial(store_rows, eps=eps, wide=wide)
        args = rows, weight, rotation.cos, rotation.sin
        if not is_whole(rows.shape[-1], 2 * rotation.cos.shape[-1]):  # of a model smaller than the published
            return plain(*args)
        return differentiable(functools.partial(store_rows_tpu, eps=eps, wide=wide, **self._options), plain, *args)

    def norm_heads(self, q: jax.Array, rotation: Rotation, eps: float) -> jax.Array:
        plain = functools.partial(norm_heads, eps=eps)
        if q.shape[-1] % LANES or 2 * rotation.cos.shape[-1] > LANES:  # of a model smaller than the published
            return plain(q, rotation.cos, rotation.sin)
        kernel = functools.partial(norm_heads_tpu, eps=eps, **self._options)
        return differentiable(kernel, plain, q, rotation.cos, rotation.sin)

    def output_projection(
        self, o: jax.Array, rotation: Rotation, o_a: Weight, o_b: Weight, groups: int, numerics: Numerics
    ) -> jax.Array:
        plain = functools.partial(grouped_output, groups=groups)
        options = {"groups": groups, **self._options}
        kernel = lambda o, r, w: grouped_output_projection_tpu(o, r.cos, r.sin, w.data, w.scale, **options)
        o = differentiable(kernel, plain, o, rotation, o_a) if is_fp8(o_a) else plain(o, rotation, o_a)
        return self.project(numerics.activations(o, o_b), o_b)

    def sparse_mla(self, q, positions, window: Window, entries, picks: Picks | None, sinks, *, scale: float):
        kernel = functools.partial(sparse_mla_tpu, scale=scale, **self._options)
        plain = functools.partial(sparse_mla_xla, scale=scale)
        return differentiable(kernel, plain, q, positions, window, entries, picks, sinks)

    def put_rows(self, held, rows, index: jax.Array):
        is_narrow = any(x.dtype.itemsize == 1 for x in jax.tree.leaves(held))
        if not is_narrow or index.shape[1] > MOST_PUT:
            return put_rows(held, rows, index)
        return differentiable(functools.partial(put_rows_tpu, **self._options), put_rows, held, rows, index)

    def pool_window(self, kv, gate, start, end, *, ratio: int, overlap: bool, dtype) -> jax.Array:
        sizes: dict[str, Any] = {"ratio": ratio, "overlap": overlap, "dtype": dtype}
        plain = lambda *args: pool_window(*args, **sizes)
        if kv.shape[2] // (1 + overlap) % LANES:  # of a model smaller than the published
            return plain(kv, gate, start, end)
        kernel = functools.partial(pool_window_tpu, **sizes, **self._options)
        pool = lambda: differentiable(kernel, plain, kv, gate, start, end)
        if kv.shape[1] % SUBLANES == 0:
            return pool()
        # XLA holds such rings with their slots first, and turns them for the kernel: not in vain.
        blank = jnp.zeros((kv.shape[0], kv.shape[2] // (1 + overlap)), dtype)
        return jax.lax.cond((start // ratio < end // ratio).any(), pool, lambda: blank)

    def pick_entries(self, q, weights, keys: IndexKeys, visible, *, top_k: int) -> Picks:
        keys = keys if isinstance(keys, Fp4Rows) else wide_keys(keys, q.dtype)
        q, weights, keys = jax.lax.stop_gradient((q, weights, keys))  # a choice has no gradient
        as_bits = q.shape[1] > DECODE_TOKENS and keys.shape[1] <= MASK_LIMIT * top_k
        return index_topk_tpu(q, weights, keys, visible, top_k=top_k, as_bits=as_bits, **self._options)

    def collapse_streams(self, streams, fn, base, scale, norm=None, *, iterations: int, eps: float, rms_eps: float):
        sizes: dict[str, Any] = {"iterations": iterations, "eps": eps, "rms_eps": rms_eps}
        kernel = functools.partial(collapse_tpu, **sizes, **self._options)
        return differentiable(kernel, functools.partial(plain_collapse, **sizes), streams, fn, base, scale, norm)

    def expand_streams(self, out, streams, mixing) -> jax.Array:
        return differentiable(functools.partial(expand_tpu, **self._options), plain_expand, out, streams, mixing)

    def expert_mlp(self, x, index, weights, gate_up, down, limit, numerics, routed=None):
        if not (is_packed(gate_up) and is_packed(down)):
            return expert_mlp(x, index, weights, gate_up, down, limit, numerics, routed)
        return expert_mlp_in_blocks(x, index, weights, gate_up, down, limit, numerics, self, routed)

    def expert_product(self, x, row, expert, used, w: Weight) -> jax.Array:
        options = self._options | {"stacks": w.shape[1] if len(w.shape) == 4 else 1}

        def kernel(x, row, expert, used, w):
            return expert_matmul_tpu(x, expert, used, w.data, w.scale, row=row, packed=w.packed, **options)

        return differentiable(kernel, multiply_blocks, x, row, expert, used, as_one(w))

    def route(self, scores, bias, *, top_k: int, factor: float) -> tuple[jax.Array, jax.Array]:
        kernel = functools.partial(route_tpu, top_k=top_k, factor=factor, **self._options)
        return differentiable(kernel, functools.partial(route, top_k=top_k, factor=factor), scores, bias)

    def arrange_pairs(self, index, weights, *, experts: int, rows: int, multiple: int) -> ExpertRows:
        sizes: dict[str, Any] = {"experts": experts, "rows": rows, "multiple": multiple}
        kernel = functools.partial(arrange_pairs_tpu, **sizes, **self._options)
        return differentiable(kernel, functools.partial(arrange_pairs, **sizes), index, weights)

    def expert_hidden(self, both, weights, limit: float, numerics: Numerics, down: Weight) -> jax.Array:
        if both.shape[-1] % (2 * LANES):  # of a model smaller than the published
            return hidden(both, weights, limit, numerics, down)
        sizes: dict[str, Any] = {"limit": limit, "rounded": numerics.rounds(down)}
        kernel = functools.partial(expert_hidden_tpu, **sizes, **self._options)
        out = differentiable(kernel, functools.partial(expert_hidden, **sizes), both, weights)
        return out if numerics.rounds(down) else numerics.activations(out, down)

    def add_rows(self, products: jax.Array, place: jax.Array) -> jax.Array:
        if products.shape[1] % LANES:  # of a model smaller than the published
            return add_rows(products, place)
        return differentiable(functools.partial(add_rows_tpu, **self._options), add_rows, products, place)


def wide_keys(keys: IndexKeys, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Index keys [B, N, D], however they are held, in `dtype`."""
    return dequantize(keys, dtype) if isinstance(keys, QuantizedArray) else dequantize_index_rows(keys, dtype)


def is_packed(w: Weight) -> TypeGuard[QuantizedArray]:
    """Whether a weight is held as codes and scales."""
    return isinstance(w, QuantizedArray) and w.scale is not None


def is_fp8(w: Weight) -> TypeGuard[QuantizedArray]:
    """Whether a weight is held as FP8 codes with a scale per 128 x 128."""
    return is_packed(w) and not w.packed and w.block == (FP8_BLOCK, FP8_BLOCK)


NAMES = ("auto", "xla", "cpu", "tpu", "gpu", "tpu-interpret")
SMALL_BYTES = 64 << 20  # of weights, expanded: XLA may hold them so, and a CPU's caches a good part of them


def resolve_kernels(name: str = "auto", device: jax.Device | None = None, *, weight_bytes: int = 0) -> Kernels:
    """The strategy called `name` for `device` (default: the first).

    "auto" is "tpu" on a TPU; "cpu" where the only device is a CPU and `weight_bytes`, which one device holds, are more
    than `SMALL_BYTES`; "xla" elsewhere. "gpu", for H100, H200 and B200, has to be asked for: it has been compiled, not
    run.

    Raises:
      ValueError: the name is not known, or the strategy cannot run on the device; the message says which can. To
        compile for another device than those present, build the strategy yourself: `TpuKernels(chip("v6e"))`.
    """
    if name not in NAMES:
        raise ValueError(f"kernels={name!r} is not known; choose one of {', '.join(map(repr, NAMES))}")
    if name == "xla":
        return XlaKernels()
    if name == "tpu-interpret":
        return TpuKernels(chip("v6e"), interpret=True)
    device = jax.local_devices()[0] if device is None else device
    if name == "auto" and device.platform == "cpu" and weight_bytes > SMALL_BYTES and jax.device_count() == 1:
        name = "cpu"
    if name == "cpu":
        if device.platform != "cpu":
            raise ValueError(f"kernels='cpu' cannot run on {device.device_kind!r}; choose 'auto' or 'xla'")
        from dsv4_jax.kernels_cpu import CpuKernels  # which imports this module

        return CpuKernels()
    if name == "gpu":
        if device.platform not in ("gpu", "cuda"):
            raise ValueError(f"kernels='gpu' cannot run on {device.device_kind!r}; choose 'auto' or 'xla'")
        from dsv4_jax.kernels_gpu import GpuKernels  # which imports this module

        return GpuKernels(chip_of(device))
    if device.platform == "tpu":
        return TpuKernels(chip_of(device))
    if name == "tpu":
        raise ValueError(
            f"kernels='tpu' cannot run on {device.device_kind!r}; choose 'auto' or 'xla', or 'tpu-interpret' for tests"
        )
    return XlaKernels()
