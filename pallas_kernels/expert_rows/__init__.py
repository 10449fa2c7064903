"""What lies between and behind the products of experts: the gated activation, and each token's sum."""

from pallas_kernels.expert_rows.reference import add_rows, clamped_swiglu, expert_hidden
from pallas_kernels.expert_rows.tpu import add_rows_tpu, expert_hidden_tpu

__all__ = ["add_rows", "add_rows_tpu", "clamped_swiglu", "expert_hidden", "expert_hidden_tpu"]
