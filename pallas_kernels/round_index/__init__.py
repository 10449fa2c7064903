"""Index queries and keys, rounded as their 4-bit codes hold them."""

from pallas_kernels.round_index.reference import encode_index, rotated_index, round_fp4, round_index
from pallas_kernels.round_index.tpu import encode_index_tpu, round_index_tpu

__all__ = ["encode_index", "encode_index_tpu", "rotated_index", "round_fp4", "round_index", "round_index_tpu"]
