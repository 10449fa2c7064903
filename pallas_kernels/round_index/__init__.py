"""Index queries and keys, rounded as their 4-bit codes hold them."""

from pallas_kernels.round_index.reference import rotated_index, round_fp4, round_index
from pallas_kernels.round_index.tpu import round_index_tpu

__all__ = ["rotated_index", "round_fp4", "round_index", "round_index_tpu"]
