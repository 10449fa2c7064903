from pallas_kernels.hyper_connection.reference import collapse, expand
from pallas_kernels.hyper_connection.tpu import collapse_tpu, expand_tpu

__all__ = ["collapse", "collapse_tpu", "expand", "expand_tpu"]
