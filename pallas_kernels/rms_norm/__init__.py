"""RMS norm with a weight."""

from pallas_kernels.rms_norm.reference import rms_norm
from pallas_kernels.rms_norm.tpu import rms_norm_tpu

__all__ = ["rms_norm", "rms_norm_tpu"]
