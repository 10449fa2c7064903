"""Projected KV rows as the 8-bit cache holds them."""

from pallas_kernels.store_rows.reference import store_rows
from pallas_kernels.store_rows.tpu import store_rows_tpu

__all__ = ["store_rows", "store_rows_tpu"]
