"""Shared fixtures."""

from __future__ import annotations

import pytest
from golden_cases import GOLDEN, load_model

from dsv4_jax import DeepseekV4


@pytest.fixture(scope="session")
def tiny() -> DeepseekV4:
    """All layer kinds, hash and top-k routing, fp8 and fp4 weights; float32."""
    return load_model(GOLDEN / "tiny" / "fp8")
