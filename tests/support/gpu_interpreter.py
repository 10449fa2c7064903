"""The parameters of Pallas's interpreter for GPU kernels, wherever this jax keeps them."""

from __future__ import annotations

from jax.experimental.pallas import mosaic_gpu as plgpu

if hasattr(plgpu, "InterpretGPUParams"):
    InterpretGPUParams = plgpu.InterpretGPUParams
else:  # jax 0.10
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

__all__ = ["InterpretGPUParams"]
