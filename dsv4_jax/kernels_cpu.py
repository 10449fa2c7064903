"""The strategy for one CPU: products read their weights where they lie and as they are stored, in few calls."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.experts import as_one, expert_mlp, expert_mlp_in_blocks, multiply_blocks
from dsv4_jax.gradients import differentiable
from dsv4_jax.kernels import XlaKernels, grouped_output
from dsv4_jax.linear import linear, matmul
from dsv4_jax.numerics import Numerics
from dsv4_jax.quantized import FP4_BLOCK, QuantizedArray, Weight
from dsv4_jax.rope import Rotation, apply_rope
from pallas_kernels.cpu_matmul import StoredWeights
from pallas_kernels.hyper_connection import collapse as plain_collapse
from pallas_kernels.hyper_connection import expand as plain_expand
from pallas_kernels.routing import ExpertRows

BLOCK_ROWS = 16  # of experts' products: a tile or two of the kernel, so that little of them is empty


@dataclass(frozen=True)
class CpuKernels(XlaKernels):
    """Products by `cpu_matmul`, which reads weights as they are stored, and float32 hyper-connections by a call each.
    The rest is XLA's.

    For a model that one CPU holds: XLA would gather what a mesh has spread before it calls a kernel like this.
    """

    name = "cpu"
    one_device = True
    reads_packed = True
    most_block_rows = BLOCK_ROWS

    def __post_init__(self):
        if importlib.util.find_spec("numba") is None:
            raise ValueError("kernels='cpu' needs Numba: pip install numba, or choose 'xla'")

    def project(self, x: jax.Array, w: Weight) -> jax.Array:
        return self.project_each(x, w)[0]

    def project_each(self, x: jax.Array, *weights: Weight) -> tuple[jax.Array, ...]:
        plain = lambda x, *w: tuple(linear(x, each) for each in w)
        if not all(is_readable(x, w) for w in weights):
            return plain(x, *weights)
        kernel = lambda x, *w: tuple(y.astype(x.dtype) for y in _each(x, w))
        return differentiable(kernel, plain, x, *weights)

    def matmul_each(self, x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
        plain = lambda x, *w: tuple(matmul(x, each) for each in w)
        if not all(is_readable(x, w) for w in weights):
            return plain(x, *weights)
        return differentiable(lambda x, *w: _each(x, w), plain, x, *weights)

    def output_projection(
        self, o: jax.Array, rotation: Rotation, o_a: Weight, o_b: Weight, groups: int, numerics: Numerics
    ) -> jax.Array:
        is_ours = is_readable(o, o_a) and _divides(o_a, groups)
        kernel = lambda o, r, w: _grouped(o, r, w, groups)
        plain = lambda o, r, w: grouped_output(o, r, w, groups)
        o = differentiable(kernel, plain, o, rotation, o_a) if is_ours else plain(o, rotation, o_a)
        return self.project(numerics.activations(o, o_b), o_b)

    def collapse_streams(self, streams, fn, base, scale, norm=None, *, iterations: int, eps: float, rms_eps: float):
        sizes: dict[str, Any] = {"iterations": iterations, "eps": eps, "rms_eps": rms_eps}
        if not streams.size or streams.dtype != jnp.float32:
            return super().collapse_streams(streams, fn, base, scale, norm, **sizes)
        from pallas_kernels.hyper_connection.cpu import collapse_cpu  # which imports Numba

        def kernel(streams, fn, base, scale, norm):
            (mix,) = _each(streams.reshape(*streams.shape[:2], -1), (fn,))
            return collapse_cpu(streams, mix, base, scale, norm, **sizes)

        plain = functools.partial(plain_collapse, **sizes)
        return differentiable(kernel, plain, streams, fn, base, scale, norm)

    def expand_streams(self, out, streams, mixing) -> jax.Array:
        if isinstance(mixing, tuple):  # as XLA's `collapse_streams` gave it
            return super().expand_streams(out, streams, mixing)
        from pallas_kernels.hyper_connection.cpu import expand_cpu

        return differentiable(expand_cpu, plain_expand, out, streams, mixing)

    def expert_mlp(self, x, index, weights, gate_up, down, limit, numerics, routed=None):
        if not all(is_readable(x, as_one(w)) for w in (gate_up, down)):
            return expert_mlp(x, index, weights, gate_up, down, limit, numerics, routed)
        return expert_mlp_in_blocks(x, index, weights, gate_up, down, limit, numerics, self, routed)

    def arrange_pairs(self, index, weights, *, experts: int, rows: int, multiple: int) -> ExpertRows:
        if rows > 1:
            return super().arrange_pairs(index, weights, experts=experts, rows=rows, multiple=multiple)
        pair = jnp.arange(index.size)  # each a block: nothing to sort
        flat = index.reshape(-1), jnp.int32(index.size), pair // index.shape[1], weights.reshape(-1, 1)
        return ExpertRows(*flat, pair.reshape(index.shape))

    def expert_product(self, x, row, expert, used, w: Weight) -> jax.Array:
        kernel = lambda x, row, expert, used, w: _product(x, row, expert, used, w).astype(x.dtype)
        return differentiable(kernel, multiply_blocks, x, row, expert, used, as_one(w))


def is_readable(x: jax.Array, w: Any) -> bool:
    """Whether the kernel multiplies x with w [..., N, K] as `linear` does, which casts weights to x's dtype first."""
    if not x.size or x.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    if not isinstance(w, QuantizedArray):
        return isinstance(w, jax.Array) and w.dtype in (jnp.bfloat16, x.dtype)
    if w.scale is None or (w.scale.dtype != jnp.uint8 and x.dtype != jnp.float32):
        return False
    return not w.packed or (w.block == FP4_BLOCK and w.shape[-1] % FP4_BLOCK[1] == 0)


def _held(w: Any) -> StoredWeights:
    """[N, K] or [E, N, K], as the kernel takes it."""
    three = lambda a: a if a.ndim == 3 else a[None]
    if isinstance(w, QuantizedArray):
        return StoredWeights(three(w.data), three(w.scale), w.block)
    return StoredWeights(three(w))


def _product(x: jax.Array, row: jax.Array | None, expert: jax.Array, used, w: Any) -> jax.Array:
    from pallas_kernels.cpu_matmul.cpu import stored_matmul_cpu  # which imports Numba

    return stored_matmul_cpu(x.astype(jnp.float32), row, expert, used, [_held(w)])[0]


def _each(x: jax.Array, weights: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    """fp32 [..., N] for each weight [N, K]; one call for those of one kind."""
    from pallas_kernels.cpu_matmul.cpu import stored_matmul_cpu

    rows, held = x.reshape(-1, x.shape[-1]).astype(jnp.float32), [_held(w) for w in weights]
    alike = len({(w.data.dtype, w.block, w.data.shape[2]) for w in held}) == 1
    product = lambda *w: stored_matmul_cpu(rows, None, jnp.zeros((1,), jnp.int32), jnp.int32(1), w)
    out = product(*held) if alike else [product(w)[0] for w in held]
    return tuple(y.reshape(*x.shape[:-1], -1) for y in out)


def _divides(o_a: Any, groups: int) -> bool:
    """Whether the rows of a group have scales of their own."""
    return not isinstance(o_a, QuantizedArray) or o_a.shape[0] // groups % o_a.block[0] == 0


def _grouped(o: jax.Array, rotation: Rotation, o_a: Any, groups: int) -> jax.Array:
    """As `grouped_output`: each group of heads is a block, whose expert is its part of o_a."""
    B, T, H, D = o.shape
    o = apply_rope(o, jax.tree.map(lambda table: table[:, :, None], rotation), inverse=True)
    rows = jnp.moveaxis(o.reshape(B * T, groups, -1), 1, 0).reshape(groups * B * T, -1)
    apart = jax.tree.map(lambda a: a.reshape(groups, -1, a.shape[-1]), o_a)
    parts = _product(rows, None, jnp.arange(groups, dtype=jnp.int32), jnp.int32(groups), apart)
    parts = jnp.moveaxis(parts.reshape(groups, B * T, -1), 0, 1)
    return parts.reshape(B, T, -1).astype(o.dtype)
