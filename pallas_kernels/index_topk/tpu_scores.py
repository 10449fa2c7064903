"""What scoring keys has in common in prefill and in decode on TPU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Chip
from pallas_kernels.index_topk.tpu_select import NT

ROWS = 8  # sublanes of a register
E2M1_UNIT = 2.0**14  # an e2m1 value over that of its code placed as e5m2
HIDDEN = -(2**31)  # below the integer of every score


def ordered(scores: jax.Array) -> jax.Array:
    """fp32 -> int32 of the same order, with one zero."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.where(scores == 0, 0, jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


def key_dots(q, keys) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    return jax.lax.dot_general(q, keys.astype(q.dtype), NT, precision=precision, preferred_element_type=jnp.float32)


def check_vmem(shape: tuple[int, ...], chip: Chip) -> None:
    size = 4 * math.prod(shape)
    if size > chip.vmem_bytes * 5 // 8:
        raise ValueError(
            f"index_topk_tpu: scores of one tile need {size} bytes of the {chip.vmem_bytes} of VMEM on {chip.name}; "
            f"use a smaller query_tile or the xla op"
        )
