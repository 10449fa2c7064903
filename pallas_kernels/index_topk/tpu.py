"""Index scores and their exact top-k on TPU, in one pass over the keys.

Blocks of keys stream by; their scores stay in VMEM as integers of the same order. After the last block the picks are
found and written: no score and no mask ever goes to HBM. `tpu_prefill` does so for many queries, `tpu_decode` for few.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Chip, require
from pallas_kernels.index_rows import Fp4Rows, dequantize_index_rows
from pallas_kernels.index_topk.reference import check_shapes
from pallas_kernels.index_topk.tpu_decode import select_decode
from pallas_kernels.index_topk.tpu_lists import indices_from_bits_tpu
from pallas_kernels.index_topk.tpu_prefill import select_prefill
from pallas_kernels.index_topk.tpu_scores import E2M1_UNIT, ROWS
from pallas_kernels.index_topk.tuning import DECODE_TOKENS, Config, default_config
from pallas_kernels.mask_bits import LANES, MaskBits
from pallas_kernels.sparse_mla.reference import Indices


def index_topk_tpu(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array | Fp4Rows,
    visible: jax.Array,
    *,
    top_k: int,
    chip: Chip,
    scale: jax.Array | None = None,
    as_bits: bool | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> Indices | MaskBits:
    """The picks of `reference.pick_entries`; indices ascend instead of being ordered by score.

    Args:
      q: [B, T, H, D <= 128] bf16 or fp32. weights: [B, T, H]. visible: int32 [B, T].
      keys: [B, N, D] in q.dtype, or Fp4Rows, or float8_e4m3fn codes with `scale`, fp32 [B, N], one positive factor per
        entry.
      as_bits: MaskBits rather than Indices; None: from 9 queries a row on.
    Raises:
      ValueError: shapes disagree, `chip` is no TPU, or one tile's scores exceed its VMEM.
    """
    require(chip, "index_topk_tpu", platform="tpu")
    _check(q, weights, keys, visible, scale, top_k)
    q, weights, keys = _whole_registers(q, weights, keys)
    (_, T, _, _), N = q.shape, keys.shape[1]
    config = config or default_config(T, N, chip, q.shape[0])
    top_k = min(top_k, N)
    as_bits = T > DECODE_TOKENS if as_bits is None else as_bits
    decode = T <= DECODE_TOKENS and not as_bits
    if not decode and T <= DECODE_TOKENS:
        config = dataclasses.replace(default_config(DECODE_TOKENS + 1, N, chip), data_dependent=config.data_dependent)
    if decode:
        rows = keys.data if isinstance(keys, Fp4Rows) else keys
        picked = select_decode(q, weights, rows, visible, scale, top_k, chip, config, interpret)
        return Indices(picked[..., :top_k])
    visible = jnp.clip(visible, 0, N).astype(jnp.int32)
    if isinstance(keys, Fp4Rows):  # in the order and the unit of `_wide_keys`
        q, keys = jnp.concatenate([q[..., 0::2], q[..., 1::2]], axis=-1) * E2M1_UNIT, keys.data
    bits = MaskBits(select_prefill(q, weights, keys, visible, scale, top_k, chip, config, interpret), N)
    return bits if as_bits else Indices(indices_from_bits_tpu(bits, top_k=top_k, chip=chip, interpret=interpret))


def _check(q, weights, keys, visible, scale, top_k: int) -> None:
    check_shapes("index_topk_tpu", q, weights, keys, visible)
    D = q.shape[3]
    if D > LANES or top_k < 1:
        raise ValueError(f"index_topk_tpu: {D=} must be at most 128 and {top_k=} positive; use the xla op")
    if isinstance(keys, Fp4Rows):
        fits = scale is None
    else:
        fits = scale is None and keys.dtype == q.dtype or scale is not None and keys.dtype == jnp.float8_e4m3fn
    if not fits:
        held = "Fp4Rows" if isinstance(keys, Fp4Rows) else keys.dtype
        raise ValueError(
            f"index_topk_tpu: keys {held} must be {q.dtype} as the queries, Fp4Rows, or float8 codes with a scale"
        )
    if scale is not None and scale.shape != keys.shape[:2]:
        raise ValueError(f"index_topk_tpu: scale {scale.shape} must be {keys.shape[:2]}, one factor per entry")


def _whole_registers(q, weights, keys):
    """Heads of 128 channels, a multiple of 8 of them, for models smaller than the published; zeros change no score."""
    channels, heads = LANES - q.shape[3], -q.shape[2] % ROWS
    if channels and isinstance(keys, Fp4Rows):
        keys = dequantize_index_rows(keys, q.dtype)
    if not (channels or heads):
        return q, weights, keys
    q = jnp.pad(q, ((0, 0), (0, 0), (0, heads), (0, channels)))
    keys = jnp.pad(keys, ((0, 0), (0, 0), (0, channels))) if channels else keys
    return q, jnp.pad(weights, ((0, 0), (0, 0), (0, heads))), keys
