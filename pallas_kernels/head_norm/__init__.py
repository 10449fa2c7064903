"""The norm of each query head and its rotation."""

from pallas_kernels.head_norm.reference import norm_heads
from pallas_kernels.head_norm.tpu import norm_heads_tpu

__all__ = ["norm_heads", "norm_heads_tpu"]
