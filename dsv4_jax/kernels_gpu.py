"""The strategy for NVIDIA GPUs with wgmma or tcgen05 (H100, H200, B200): kernels by Mosaic GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from dsv4_jax.experts import as_one, expert_mlp, expert_mlp_in_blocks, multiply_blocks
from dsv4_jax.gradients import differentiable
from dsv4_jax.kernels import IndexKeys, XlaKernels, grouped_output, is_fp8, is_packed, wide_keys
from dsv4_jax.linear import linear
from dsv4_jax.numerics import Numerics
from dsv4_jax.quantized import QuantizedArray, Weight
from dsv4_jax.rope import Rotation
from pallas_kernels.chips import MOSAIC_GPUS, Chip, require
from pallas_kernels.expert_matmul.gpu import expert_matmul_gpu
from pallas_kernels.expert_matmul.reference import pick_rows
from pallas_kernels.fp8_matmul.gpu import fp8_matmul_gpu, grouped_output_projection_gpu
from pallas_kernels.index_rows import Fp4Rows
from pallas_kernels.index_topk.gpu import index_topk_gpu
from pallas_kernels.sparse_mla import Picks, Window, sparse_mla_xla
from pallas_kernels.sparse_mla.gpu import sparse_mla_gpu
from pallas_kernels.sparse_mla.gpu_device import HEADS


@dataclass(frozen=True)
class GpuKernels(XlaKernels):
    """Mosaic GPU kernels. Products with unquantised weights are XLA's.

    The model must be in bfloat16, with 256 or 512 channels a head; other operands that a kernel cannot take raise a
    ValueError, too, which names what to choose instead.

    chip: what to compile for, a GPU of compute capability 9.0 or 10.0. interpret: None, or Pallas's InterpretGPUParams
    to run the kernels on CPU, for tests.
    """

    chip: Chip
    interpret: Any = None

    name = "gpu"
    prefill_chunk = 2048
    reads_packed = True
    has_streams = True

    def __post_init__(self):
        with or_xla():
            require(self.chip, "kernels='gpu'", platform="cuda", generations=MOSAIC_GPUS)

    @property
    def _options(self):
        return {"chip": self.chip, "interpret": self.interpret}

    def padded_heads(self, heads: int) -> int:
        return -(-heads // HEADS) * HEADS

    def project(self, x: jax.Array, w: Weight) -> jax.Array:
        if not is_fp8(w):
            return linear(x, w)
        kernel = lambda x, w: fp8_matmul_gpu(x, w.data, w.scale, **self._options)
        with or_xla():
            return differentiable(kernel, linear, x, w)

    def output_projection(
        self, o: jax.Array, rotation: Rotation, o_a: Weight, o_b: Weight, groups: int, numerics: Numerics
    ) -> jax.Array:
        plain = functools.partial(grouped_output, groups=groups)
        options = {"groups": groups, **self._options}
        kernel = lambda o, r, w: grouped_output_projection_gpu(o, r.cos, r.sin, w.data, w.scale, **options)
        with or_xla():
            o = differentiable(kernel, plain, o, rotation, o_a) if is_fp8(o_a) else plain(o, rotation, o_a)
        return self.project(numerics.activations(o, o_b), o_b)

    def sparse_mla(self, q, positions, window: Window, entries, picks: Picks | None, sinks, *, scale: float):
        kernel = functools.partial(sparse_mla_gpu, scale=scale, **self._options)
        plain = functools.partial(sparse_mla_xla, scale=scale)
        with or_xla():
            return differentiable(kernel, plain, q, positions, window, entries, picks, sinks)

    def pick_entries(self, q, weights, keys: IndexKeys, visible, *, top_k: int) -> Picks:
        keys = keys if isinstance(keys, Fp4Rows) else wide_keys(keys, q.dtype)
        q, weights, keys = jax.lax.stop_gradient((q, weights, keys))  # a choice has no gradient
        with or_xla():
            return index_topk_gpu(q, weights, keys, visible, top_k=top_k, **self._options)

    def expert_mlp(self, x, index, weights, gate_up, down, limit, numerics, routed=None):
        if not (is_packed(gate_up) and is_packed(down)):
            return expert_mlp(x, index, weights, gate_up, down, limit, numerics, routed)
        # XLA 0.10's Triton emitter cannot join the sum over a token's weights with the concatenation that follows.
        weights = jax.lax.optimization_barrier(weights)
        return expert_mlp_in_blocks(x, index, weights, gate_up, down, limit, numerics, self, routed)

    def expert_product(self, x, row, expert, used, w: Weight) -> jax.Array:
        w = as_one(w)
        if not isinstance(w, QuantizedArray):  # `as_one` expanded what its blocks span
            raise ValueError(
                f"kernels='gpu': gate and up of {w.shape[1] // 2} rows do not end with a block of their scales; "
                "choose kernels='xla'"
            )
        kernel = lambda x, row, expert, used, w: expert_matmul_gpu(
            x, expert, used, w.data, w.scale, packed=w.packed, **self._options
        )
        with or_xla():
            return differentiable(kernel, multiply_blocks, pick_rows(x, row), None, expert, used, w)


@contextlib.contextmanager
def or_xla() -> Iterator[None]:
    """Add to the message of a ValueError that another strategy takes what a kernel refused."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; or choose kernels='xla'") from error
