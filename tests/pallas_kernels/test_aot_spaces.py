"""What is read of a compiled TPU program: where the operands of its kernels lie."""

from __future__ import annotations

from pallas_kernels.aot import operand_spaces

PROGRAM = """
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %copy.2 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy(%p.1)
  %scale.3 = f32[1,128]{1,0:T(1,128)S(1)} parameter(1)
  %norm.4 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} custom-call(%copy.2, %scale.3), custom_call_target="tpu_custom_call"
  %norm.5 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%p.1, %scale.3), custom_call_target="tpu_custom_call"
  ROOT %norm.6 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%copy.2, %scale.3), custom_call_target="tpu_custom_call"
  %pair.7 = (f32[4]{0:T(128)}, s32[8]{0:T(128)S(1)}) custom-call(%p.1), custom_call_target="tpu_custom_call"
  %other.8 = f32[2]{0} custom-call(%p.1), custom_call_target="Sharding"
"""


def test_operands_then_results_by_majority():
    assert operand_spaces(PROGRAM) == {
        "norm(bf16[8,128], f32[1,128])": [True, True, False],
        "pair(bf16[8,128])": [False, False, True],
    }
