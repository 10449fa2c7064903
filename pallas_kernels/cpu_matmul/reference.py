"""The contract of products with weights as they are stored, in the plainest jnp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.expert_matmul.reference import pick_rows
from pallas_kernels.formats import decode_e2m1, decode_e4m3, unpack_fp4
from pallas_kernels.fp8_matmul.reference import scale_value


@dataclass(frozen=True)
class StoredWeights:
    """Weights [E, N, K] of E experts, or E = 1 of one.

    data: float32 or bfloat16 [E, N, K], float8_e4m3fn [E, N, K], or uint8 [E, N, K / 2]: two e2m1 codes a byte, the low
      nibble being the even channel.
    scale: of codes, uint8 e8m0 exponent bytes or float32 [E, ceil(N / block[0]), ceil(K / block[1])]; else None.
    block: rows and columns that share a scale; (1, 32) for e2m1.
    """

    data: jax.Array
    scale: jax.Array | None = None
    block: tuple[int, int] = (128, 128)

    def values(self) -> jax.Array:
        """float32 [E, N, K]."""
        if self.scale is None:
            return self.data.astype(jnp.float32)
        packed = self.data.dtype == jnp.uint8
        codes = decode_e2m1(unpack_fp4(self.data)) if packed else decode_e4m3(self.data)
        scale = jnp.repeat(scale_value(self.scale), self.block[0], 1)[:, : codes.shape[1]]
        return codes * jnp.repeat(scale, self.block[1], 2)[..., : codes.shape[2]]


def stored_matmul(
    x: jax.Array,
    row: jax.Array | None,
    expert: jax.Array,
    used: jax.Array,
    weights: Sequence[StoredWeights],
) -> tuple[jax.Array, ...]:
    """Blocks of rows, each times every one of the weights of its expert, transposed.

    Args:
      x: float32 [n, K].
      row: int32 [blocks * R], which rows of x the blocks hold, R a block, as `pick_rows` takes them;
        None: all rows, in order.
      expert: int32 [blocks] in [0, E).
      used: int32 scalar; blocks from there on hold nothing, and read no weights.
      weights: of the same E and K, and of one kind.
    Returns:
      a float32 [blocks * R, N] for each weight, multiplied and summed in float32. Rows of blocks that are not used are
      zeros here; implementations may leave anything there, and sum in another order.
    """
    rows = pick_rows(x, row)
    blocks = rows.reshape(len(expert), -1, x.shape[-1])
    is_used = (jnp.arange(len(expert)) < used)[:, None, None]

    def product(w: StoredWeights) -> jax.Array:
        out = jnp.einsum("brk,bnk->brn", blocks, w.values()[expert], precision="highest")
        return jnp.where(is_used, out, 0).reshape(len(rows), -1)

    return tuple(map(product, weights))
