"""Activations times FP8 block-scaled weights, and the grouped form of the output projection."""

from pallas_kernels.fp8_matmul.reference import fp8_matmul, grouped_output_projection

__all__ = ["fp8_matmul", "grouped_output_projection"]
