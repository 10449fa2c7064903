"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

# Set before jax is imported. Machine code of tests is run a few times and compiled once, so the compiler may hurry; and
# workers, commands and later runs share what was compiled.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla"))

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
