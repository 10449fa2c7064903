"""Sparse multi-query latent attention: each query attends to its window and to picked compressed entries."""

from pallas_kernels.sparse_mla.reference import FirstN, Indices, Mask, Picks, Window, sparse_mla
from pallas_kernels.sparse_mla.xla import sparse_mla_xla

__all__ = ["FirstN", "Indices", "Mask", "Picks", "Window", "sparse_mla", "sparse_mla_xla"]
