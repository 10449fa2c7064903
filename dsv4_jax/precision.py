"""What low precision costs: the error of each number format, of each layer, and of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_jax.anatomy import LayerView
from dsv4_jax.model import DeepseekV4
from dsv4_jax.numerics import ExactNumerics, Numerics, OfficialNumerics
from dsv4_jax.quantized import dequantize, quantize_fp8
from pallas_kernels.formats import hadamard
from pallas_kernels.kv_rows import dequantize_rows, quantize_rows
from pallas_kernels.round_index import round_fp4
from pallas_kernels.round_rows import round_rows


def _kv_row(x: jax.Array) -> jax.Array:
    """As a KV row is held, if all of its channels were coded."""
    return dequantize_rows(quantize_rows(x, 0), jnp.float32)


# Name -> fp32 [rows, columns] as the format gives it back.
FORMATS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "bfloat16": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "e4m3, 128 x 128": lambda x: dequantize(quantize_fp8(x, (128, 128)), jnp.float32),
    "e4m3, 1 x 128": round_rows,
    "e4m3, 1 x 64 (KV row)": _kv_row,
    "e2m1, 1 x 32": round_fp4,
    "e2m1, 1 x 32, Hadamard": lambda x: hadamard(round_fp4(hadamard(x))),
}


def relative_error(got, want) -> float:
    """Root mean square of got - want over that of want; the same shape, any."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"relative_error: shapes {got.shape} and {want.shape} differ")
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def format_errors(x) -> dict[str, float]:
    """Relative error of x [rows, columns] in each of FORMATS; columns a power of two (the Hadamard transform)."""
    x = jnp.asarray(x, jnp.float32)
    return {name: relative_error(rounded(x), x) for name, rounded in FORMATS.items()}


def layer_errors(got: Sequence[LayerView], want: Sequence[LayerView]) -> np.ndarray:
    """Relative error of the streams after each layer."""
    return np.array([relative_error(a.streams, b.streams) for a, b in zip(got, want, strict=True)])


@dataclass(frozen=True)
class LogitError:
    """How two sets of logits differ: mean KL(want || got) in nats, relative error, share of equal winners."""

    kl: float
    relative: float
    same_winner: float


def logit_error(got, want) -> LogitError:
    """Logits [..., V] against those wanted; a constant added to a row of logits counts for nothing."""
    got, want = (x - x.mean(-1, keepdims=True) for x in (np.asarray(got, np.float64), np.asarray(want, np.float64)))
    log_got, log_want = (np.asarray(x - np.logaddexp.reduce(x, axis=-1, keepdims=True)) for x in (got, want))
    kl = float((np.exp(log_want) * (log_want - log_got)).sum(-1).mean())
    return LogitError(kl, relative_error(got, want), float((got.argmax(-1) == want.argmax(-1)).mean()))


class OnlyActivations(ExactNumerics):
    """Of the official rounding points only those in front of quantised weights."""

    name = "activations"
    rounds, activations = OfficialNumerics.rounds, OfficialNumerics.activations


class OnlyKv(ExactNumerics):
    """Of the official rounding points only the KV rows'."""

    name = "KV rows"
    kv = OfficialNumerics.kv


class OnlyIndex(ExactNumerics):
    """Of the official rounding points only the index queries' and keys'."""

    name = "indexer"
    index = OfficialNumerics.index


def with_numerics(model: DeepseekV4, numerics: Numerics) -> DeepseekV4:
    """The same weights under other numerics; arrays are shared, `model` stays as it is."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    for _, module in nnx.iter_modules(copy):
        if hasattr(module, "numerics"):
            module.numerics = numerics
    return copy
