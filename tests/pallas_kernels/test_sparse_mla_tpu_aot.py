"""Sparse MLA compiles to machine code for every TPU generation; needs libtpu, no TPU. One child process per chip."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
ENV = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}
# name: B, T, heads, entries, picks (a number: that many indices), 8-bit rows; Flash has 64 heads, Pro 128
CASES = {
    "Flash decode, gathered": (4, 1, 64, 16384, 512, False),
    "Flash prefill, CSA": (1, 512, 64, 2048, 512, False),
    "Pro decode, 8-bit HCA": (4, 4, 128, 1024, "first", True),
    "Pro prefill, mask": (1, 512, 128, 2048, "mask", False),
}
MORE = {
    "Flash decode, HCA": (4, 1, 64, 1024, "first", False),
    "Flash prefill, 8-bit HCA": (1, 512, 64, 64, "first", True),
    "Pro decode, gathered 8-bit": (2, 1, 128, 16384, 1024, True),
}
CASES |= MORE if os.environ.get("DSV4_FULL_TESTS") else {}


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", TOPOLOGY)
def test_compiles(name):
    child = subprocess.run(
        [sys.executable, __file__, name], env={**os.environ, **ENV}, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, child.stderr[-3000:]
    assert json.loads(child.stdout.splitlines()[-1]) == {case: True for case in CASES}


def compiles(chip_name: str, case) -> bool:
    """Whether the kernel is in the compiled program; the compiler itself raises where memory does not suffice."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.chips import chip
    from pallas_kernels.kv_rows import Fp8Rows
    from pallas_kernels.sparse_mla import FirstN, Indices, Mask, Window
    from pallas_kernels.sparse_mla.tpu import sparse_mla_tpu

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip_name]).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    sds = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    B, T, H, N, kind, fp8 = case
    D, R, size = 512, 64, 128

    def rows(n):
        if not fp8:
            return sds(B, n, D, dtype=jnp.bfloat16)
        codes, rope = sds(B, n, D - R, dtype=jnp.float8_e4m3fn), sds(B, n, R, dtype=jnp.bfloat16)
        return Fp8Rows(codes, sds(B, n, 8, dtype=jnp.uint8), rope)

    S = T + size - 1 if T > 16 else size + 3
    picks = {"first": FirstN(sds(B, T)), "mask": Mask(sds(B, T, N, dtype=jnp.bool_))}.get(kind)
    picks = picks or Indices(sds(B, T, kind))
    op = lambda *args: sparse_mla_tpu(*args, scale=D**-0.5, chip=chip(chip_name))
    args = sds(B, T, H, D, dtype=jnp.bfloat16), sds(B, T), Window(rows(S), sds(B, S), size, is_band=T > 16)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it for the kind of device
        traced = jax.jit(op).trace(*args, rows(N), picks, sds(H, dtype=jnp.float32))
        lowered = traced.lower(lowering_platforms=("tpu",))
    return "tpu_custom_call" in lowered.compile().as_text()


if __name__ == "__main__":
    print(json.dumps({case: compiles(sys.argv[1], operands) for case, operands in CASES.items()}))
