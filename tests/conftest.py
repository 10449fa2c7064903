"""Shared fixtures."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Set before jax is imported. Machine code of tests is run a few times and compiled once, so the compiler may hurry; and
# workers, commands and later runs share what was compiled.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla"))

# Pallas interprets the threads of a kernel side by side, each in a worker of the CPU client, and they wait for others.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))

import jax
import pytest
from golden_cases import GOLDEN, load_model

from dsv4_jax import DeepseekV4


@pytest.fixture(scope="session")
def tiny() -> DeepseekV4:
    """All layer kinds, hash and top-k routing, fp8 and fp4 weights; float32."""
    return load_model(GOLDEN / "tiny" / "fp8")


@pytest.fixture(scope="session")
def small() -> DeepseekV4:
    """One layer of each kind, fp8 and fp4 weights, a vocabulary of 192; float32. The quickest to compile."""
    return load_model(GOLDEN / "calm" / "fp8")


MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000  # Linux allows a process 65,530


@pytest.fixture(autouse=True)
def drop_machine_code():
    """Every compiled program holds memory maps; a process that runs out of them dies inside the compiler."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
