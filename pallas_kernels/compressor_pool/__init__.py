"""The entry that a short step completes, pooled from a compressor's rings."""

from pallas_kernels.compressor_pool.reference import pool_window
from pallas_kernels.compressor_pool.tpu import pool_window_tpu

__all__ = ["pool_window", "pool_window_tpu"]
