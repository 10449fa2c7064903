"""The contract of rows on their way into the cache, in the plainest jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.reference import inverse_rope
from pallas_kernels.kv_rows import GROUP, Fp8Rows, quantize_rows
from pallas_kernels.rms_norm.reference import rms_norm
from pallas_kernels.round_rows.reference import round_rows


def check_shapes(rows: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array) -> None:
    """Raise where the operands of `store_rows` do not fit each other."""
    D, table = rows.shape[-1], (*rows.shape[:2], cos.shape[-1])
    if rows.ndim != 3 or weight.shape != (D,) or cos.shape != table or sin.shape != table or 2 * table[-1] > D:
        raise ValueError(
            f"store_rows: weight {weight.shape}, cos {cos.shape} and sin {sin.shape} do not fit rows {rows.shape}"
        )


def store_rows(
    rows: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, *, eps: float, wide: bool = False
) -> Fp8Rows | jax.Array:
    """KV rows, normed, turned by RoPE, in 8 bits.

    Args:
      rows: [B, T, D], as projected or pooled.
      weight: float32 [D], of the norm; eps: added to the mean square.
      cos, sin: float32 [B, T, R / 2], of the rows' positions; they turn the trailing R channels, in pairs.
      wide: give what the codes stand for.
    Returns:
      Fp8Rows [B, T, D], whose R turned channels are bfloat16; `wide`, [B, T, D] in the rows' dtype, in which turned
      channels stay. Rows are rounded to their dtype after the norm and after the rotation.
    Raises:
      ValueError: the shapes disagree.
    Source: architecture 3.3, 3.4, 8.2.
    """
    check_shapes(rows, weight, cos, sin)
    normed = rms_norm(rows, weight, eps=eps)
    turned = inverse_rope(normed[:, :, None], cos, -sin)[:, :, 0]
    if not wide:
        return quantize_rows(turned, 2 * cos.shape[-1])
    still = rows.shape[-1] - 2 * cos.shape[-1]
    return jnp.concatenate([round_rows(turned[..., :still], GROUP), turned[..., still:]], axis=-1)
