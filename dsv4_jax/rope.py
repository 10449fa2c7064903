"""RoPE: two fp32 tables per model, each built once, and the rotation that reads them (architecture 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_jax.config import ModelConfig, Yarn
from pallas_kernels.fp8_matmul.reference import turn


class Constant(nnx.Variable):
    """An array that follows from the config: an argument of compiled steps, never trained, never in a checkpoint."""


@dataclass(frozen=True)
class RopeSpec:
    """Base, rotary width and scaling of one table."""

    theta: float
    dim: int
    yarn: Yarn | None = None

    def inv_freq(self) -> np.ndarray:
        """fp32 [dim // 2], equal bit for bit to the reference's.

        A last-bit difference here is a wrong angle at large positions, so the power is rounded to fp32 before the
        division, as there.
        """
        power = np.power(self.theta, np.arange(0, self.dim, 2) / self.dim).astype(np.float32)
        freq = np.float32(1) / power
        if self.yarn is None:
            return freq
        low, high = (self._correction_dim(beta) for beta in (self.yarn.beta_fast, self.yarn.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), self.dim - 1)
        span = np.float32(max(high - low, 1e-3))
        ramp = np.clip((np.arange(self.dim // 2, dtype=np.float32) - low) / span, 0, 1).astype(np.float32)
        return freq / np.float32(self.yarn.factor) * ramp + freq * (1 - ramp)

    def _correction_dim(self, rotations: float) -> float:
        assert self.yarn is not None
        length = self.yarn.original_max_position_embeddings
        return self.dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotation:
    """cos and sin at some positions, each [..., R // 2]."""

    cos: jax.Array
    sin: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotations:
    """What a layer rotates with in a step: at its tokens' positions, and at those of the entries they may complete."""

    tokens: Rotation
    entries: Rotation | None = None


def build_table(spec: RopeSpec, max_tokens: int) -> Rotation:
    """cos and sin of positions 0 .. max_tokens - 1, fp32 [max_tokens, R // 2].

    The angle is one fp32 product of position and inverse frequency: its rounding (up to 0.03 rad near a million) is
    part of the reference, so nothing may fuse into it or widen it.
    """
    positions = jnp.arange(max_tokens, dtype=jnp.int32).astype(jnp.float32)
    angles = jax.lax.optimization_barrier(positions[:, None] * jnp.asarray(spec.inv_freq()))
    return Rotation(jnp.cos(angles), jnp.sin(angles))


class RopeTable(nnx.Module):
    """One table, owned by the model and handed to every layer that rotates with it.

    Under `jax.eval_shape` it is abstract and allocates nothing; `fill_constants` computes it afterwards, once.
    """

    def __init__(self, spec: RopeSpec, max_tokens: int):
        self.spec, self.max_tokens = spec, max_tokens
        self._set(build_table(spec, max_tokens))

    def _set(self, table: Rotation) -> None:
        self.cos, self.sin = Constant(table.cos), Constant(table.sin)

    @property
    def is_abstract(self) -> bool:
        return isinstance(self.cos.get_value(), jax.ShapeDtypeStruct)

    def fill(self, sharding: jax.sharding.Sharding | None = None) -> None:
        """Compute an abstract table on the device(s) of `sharding` (default device without it)."""
        if self.is_abstract:
            build = jax.jit(build_table, static_argnums=(0, 1), out_shardings=sharding)
            self._set(build(self.spec, self.max_tokens))

    def __call__(self, positions: jax.Array) -> Rotation:
        """int32 [...] -> cos, sin fp32 [..., R // 2]; positions past the table (padding) read its last row."""
        take = lambda table: table[...].at[positions].get(mode="clip")
        return Rotation(take(self.cos), take(self.sin))


def rope_specs(config: ModelConfig) -> tuple[RopeSpec, RopeSpec]:
    """(main, compress): plain theta for sliding and MTP layers; YaRN for layers with a compressor."""
    dim = config.qk_rope_head_dim
    return RopeSpec(config.rope_theta, dim), RopeSpec(config.compress_rope_theta, dim, config.rope_scaling)


def apply_rope(x: jax.Array, rotation: Rotation, *, inverse: bool = False) -> jax.Array:
    """Rotate interleaved channel pairs of the trailing R channels of x; the others pass through.

    Args:
      x: [..., D].
      rotation: cos and sin [..., R // 2], broadcast against x's leading axes, in fp32 or in x.dtype.
      inverse: rotate by the conjugate (the attention output at the query's position).
    Returns:
      [..., D] in x.dtype, computed in fp32 and rounded once.
    Raises:
      TypeError: the table is neither fp32 nor of x's dtype.
    """
    if rotation.cos.dtype not in (jnp.float32, x.dtype) or rotation.sin.dtype != rotation.cos.dtype:
        raise TypeError(f"apply_rope: table is {rotation.cos.dtype}; give it in float32 or in x's {x.dtype}")
    return turn(x, rotation.cos, -rotation.sin if inverse else rotation.sin)
