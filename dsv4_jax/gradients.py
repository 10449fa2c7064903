"""Gradients of kernels: those of the plain reference that each of them must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def differentiable(kernel: Callable[..., Any], reference: Callable[..., Any], *args: Any) -> Any:
    """kernel(*args), whose gradient is reference's: a kernel has none of its own.

    Args:
      kernel, reference: the same function of pytrees; integers in them have no gradient.
    """
    call = jax.custom_vjp(kernel)
    call.defvjp(lambda *args: (kernel(*args), args), lambda args, out: jax.vjp(reference, *args)[1](out))
    return call(*args)
