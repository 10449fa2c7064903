"""Platform strategies: what the attention maths asks of a platform, chosen once when the model is built.

A strategy is frozen and hashable, so it travels with a module's structure, not with its arrays.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dsv4_jax.linear import linear
from dsv4_jax.numerics import Numerics
from dsv4_jax.quantized import QuantizedArray, Weight, dequantize
from dsv4_jax.rope import Rotation, apply_rope
from pallas_kernels.index_topk import pick_entries_xla
from pallas_kernels.sparse_mla import Picks, Window, sparse_mla_xla


class AttentionKernels(abc.ABC):
    """What a platform must supply; every implementation keeps the contract of the reference it names."""

    has_streams = False  # lanes of the schedule are streams of the device
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
    def pick_entries(self, q, weights, keys: Weight, visible, *, top_k: int) -> Picks:
        """See `pallas_kernels.index_topk.reference.pick_entries`; keys may be held in 8 or 4 bits."""


@dataclass(frozen=True)
class XlaKernels(AttentionKernels):
    """Portable: whatever XLA compiles for, it runs on."""

    name = "xla"
    reads_packed = False

    def padded_heads(self, heads: int) -> int:
        return heads

    def project(self, x: jax.Array, w: Weight) -> jax.Array:
        return linear(x, w)

    def output_projection(
        self, o: jax.Array, rotation: Rotation, o_a: Weight, o_b: Weight, groups: int, numerics: Numerics
    ) -> jax.Array:
        return linear(numerics.activations(grouped_output(o, rotation, o_a, groups), o_b), o_b)

    def sparse_mla(self, q, positions, window: Window, entries, picks: Picks | None, sinks, *, scale: float):
        return sparse_mla_xla(q, positions, window, entries, picks, sinks, scale=scale)

    def pick_entries(self, q, weights, keys: Weight, visible, *, top_k: int) -> Picks:
        keys = dequantize(keys, q.dtype) if isinstance(keys, QuantizedArray) else keys
        return pick_entries_xla(q, weights, keys, visible, top_k=top_k)


def grouped_output(o: jax.Array, rotation: Rotation, o_a: Weight, groups: int) -> jax.Array:
    """Rotate o [B, T, H, D] back and project each group of heads with its rows of o_a: -> [B, T, G * rank]."""
    B, T, H, D = o.shape
    o = apply_rope(o, jax.tree.map(lambda table: table[:, :, None], rotation), inverse=True)
    w = dequantize(o_a, o.dtype).reshape(groups, -1, H // groups * D)
    rows = jnp.moveaxis(o.reshape(B * T, groups, -1), 1, 0)
    precision = jax.lax.Precision.HIGHEST if o.dtype == jnp.float32 else None
    parts = jnp.einsum("GTK,GRK->GTR", rows, w, precision=precision, preferred_element_type=jnp.float32)
    return jnp.moveaxis(parts.astype(o.dtype), 0, 1).reshape(B, T, -1)


STRATEGIES: dict[str, AttentionKernels] = {"xla": XlaKernels()}


def resolve_kernels(name: str = "auto") -> AttentionKernels:
    """The strategy called `name`; "auto" takes the portable one, which runs everywhere."""
    if name == "auto":
        return STRATEGIES["xla"]
    if name not in STRATEGIES:
        raise ValueError(f"kernels={name!r} is not available; choose 'auto' or one of {sorted(STRATEGIES)}")
    return STRATEGIES[name]
