"""Numerics: where activations are rounded, chosen once when the model is built (architecture 8, 12).

`ExactNumerics` rounds nothing beyond the activations' own dtype. `OfficialNumerics` rounds where the released model
does, which was trained so: in front of every quantised linear map, on KV rows, on the indexer's queries and keys.
"""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dsv4_jax.config import ModelConfig
from dsv4_jax.linear import RMSNorm
from dsv4_jax.quantized import QuantizedArray, Weight
from dsv4_jax.rope import Rotation, apply_rope
from pallas_kernels.index_rows import Fp4Rows, quantize_index_rows
from pallas_kernels.round_index import round_index
from pallas_kernels.round_rows import round_rows

KV_GROUP = 64  # channels of a KV row that share a scale; its rotary channels are never rounded


class Rounds(Protocol):
    """What a platform may do faster."""

    def store_rows(self, rows: jax.Array, weight: jax.Array, rotation: Rotation, eps: float, *, wide: bool) -> Any:
        """See `pallas_kernels.store_rows.reference.store_rows`."""
        ...

    def round_rows(self, x: jax.Array) -> jax.Array:
        """See `pallas_kernels.round_rows.reference.round_rows`."""
        ...

    def rotated_index(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        """See `pallas_kernels.round_index.reference.rotated_index`."""
        ...

    def encode_index(self, x: jax.Array, rotation: Rotation) -> Fp4Rows:
        """See `pallas_kernels.round_index.reference.encode_index`."""
        ...


class Numerics(abc.ABC):
    """The rounding points that a model may have; every method gives back what it was given, rounded, in its dtype."""

    kernels: Rounds | None = None

    def on(self, kernels: Rounds) -> Numerics:
        """The same numerics, as a platform's kernels round."""
        return self

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name it is asked for by."""

    @property
    @abc.abstractmethod
    def index_format(self) -> str:
        """What holds an index key without loss in an 8-bit cache, or with the least: "fp4" or "fp8"."""

    @abc.abstractmethod
    def activations(self, x: jax.Array, w: Weight) -> jax.Array:
        """x [..., K], about to be multiplied with the weight w."""

    def rounds(self, w: Weight) -> bool:
        """Whether `activations` in front of w is `round_rows`, which a kernel may then do with what precedes it."""
        return False

    @abc.abstractmethod
    def kv(self, rows: jax.Array, rope_dim: int) -> jax.Array:
        """KV rows [..., D], window or compressed, rotated."""

    def kv_rows(self, rows: jax.Array, norm: RMSNorm, rotation: Rotation) -> jax.Array:
        """KV rows [B, T, D], to be normed and rotated by [B, T, R / 2] first."""
        return self.kv(apply_rope(norm(rows), rotation), 2 * rotation.cos.shape[-1])

    @abc.abstractmethod
    def index(self, x: jax.Array) -> jax.Array:
        """Index queries or keys [..., D], rotated."""

    def rotated_index(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        """Index queries or keys [..., D], to be rotated by [..., R / 2] first."""
        return self.index(apply_rope(x, rotation))

    def index_rows(self, x: jax.Array, rotation: Rotation) -> Fp4Rows:
        """Index keys [..., D], to be rotated first, as a cache of 4 bits holds them."""
        return quantize_index_rows(self.rotated_index(x, rotation))


@dataclass(frozen=True)
class ExactNumerics(Numerics):
    """Weights expanded at use, activations left alone."""

    name = "exact"
    index_format = "fp8"

    def activations(self, x: jax.Array, w: Weight) -> jax.Array:
        return x

    def kv(self, rows: jax.Array, rope_dim: int) -> jax.Array:
        return rows

    def index(self, x: jax.Array) -> jax.Array:
        return x


@dataclass(frozen=True)
class OfficialNumerics(Numerics):
    """The released model's rounding points; weights stored unquantised get unrounded activations, as there."""

    kernels: Rounds | None = None

    name = "official"
    index_format = "fp4"

    def on(self, kernels: Rounds) -> Numerics:
        return dataclasses.replace(self, kernels=kernels)

    def rounds(self, w: Weight) -> bool:
        return isinstance(w, QuantizedArray)

    def activations(self, x: jax.Array, w: Weight) -> jax.Array:
        if not self.rounds(w):
            return x
        return round_rows(x) if self.kernels is None else self.kernels.round_rows(x)

    def kv(self, rows: jax.Array, rope_dim: int) -> jax.Array:
        still, turning = rows[..., :-rope_dim], rows[..., -rope_dim:]
        return jnp.concatenate([round_rows(still, KV_GROUP), turning], axis=-1)

    def kv_rows(self, rows: jax.Array, norm: RMSNorm, rotation: Rotation) -> jax.Array:
        if self.kernels is None:
            return super().kv_rows(rows, norm, rotation)
        return self.kernels.store_rows(rows, norm.weight[...], rotation, norm.eps, wide=True)

    def index(self, x: jax.Array) -> jax.Array:
        return round_index(x)

    def rotated_index(self, x: jax.Array, rotation: Rotation) -> jax.Array:
        return super().rotated_index(x, rotation) if self.kernels is None else self.kernels.rotated_index(x, rotation)

    def index_rows(self, x: jax.Array, rotation: Rotation) -> Fp4Rows:
        return super().index_rows(x, rotation) if self.kernels is None else self.kernels.encode_index(x, rotation)


NUMERICS: dict[str, Numerics] = {"exact": ExactNumerics(), "official": OfficialNumerics()}


def resolve_numerics(name: str, config: ModelConfig) -> Numerics:
    """The numerics called `name`; "auto" is "official" where the checkpoint is quantised, else "exact"."""
    if name == "auto":
        name = "official" if config.quantization else "exact"
    if name not in NUMERICS:
        raise ValueError(f"numerics={name!r} is not known; choose 'auto' or one of {sorted(NUMERICS)}")
    return NUMERICS[name]
