"""Sorted rows times the packed weights of the experts they were routed to."""

from pallas_kernels.expert_matmul.reference import expert_matmul

__all__ = ["expert_matmul"]
