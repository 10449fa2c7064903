"""Products of few rows with weights that are read where they lie."""

from pallas_kernels.few_rows.reference import FewWeights, few_rows

__all__ = ["FewWeights", "few_rows"]
