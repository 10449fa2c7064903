"""Products on a CPU with weights that are read where they lie, as they are stored."""

from pallas_kernels.cpu_matmul.reference import StoredWeights, stored_matmul

__all__ = ["StoredWeights", "stored_matmul"]
