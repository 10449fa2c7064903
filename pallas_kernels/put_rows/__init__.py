"""A few rows put into long arrays, in place."""

from pallas_kernels.put_rows.reference import put_rows
from pallas_kernels.put_rows.tpu import put_rows_tpu

__all__ = ["put_rows", "put_rows_tpu"]
