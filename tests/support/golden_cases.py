"""The golden cases: where they are, models loaded once per run, and the tolerance they come with."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
from dsv4_jax import DeepseekV4

QUICK_XLA = "--xla_backend_optimization_level=0"  # programs of tests run a few times: the compiler may hurry
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
FULL = bool(os.environ.get("DSV4_FULL_TESTS"))  # everything, as before a release; otherwise what half an hour allows
GOLDEN = Path(__file__).parents[1] / "golden"
MAX_TOKENS = 1024

# max abs, mean abs, mean KL of logits in float32 (the golden data's own tolerance)
F32 = (5e-3, 5e-5, 1e-7)
ROUNDED = (1.0, 2e-2, 1e-3)  # activations rounded; winners agree in 0.98 of the clear cases


def golden_roots() -> list[Path]:
    """The cases kept here, and, where DSV4_GOLDEN names it, the full set."""
    extra = os.environ.get("DSV4_GOLDEN")
    return [GOLDEN, *([Path(extra)] if extra else [])]


def golden_checkpoints() -> list[Path]:
    """Every golden checkpoint directory, each case and flavour once."""
    found = {}
    for root in golden_roots():
        for config in sorted(root.glob("*/*/config.json")):
            found.setdefault(str(config.parent.relative_to(root)), config.parent)
    return list(found.values())


def case_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def greedy_checkpoints() -> list[Path]:
    """Those with greedy tokens."""
    return [path for path in golden_checkpoints() if path.with_name(f"{path.name}.greedy.npz").exists()]


def expected(path: Path, what: str):
    """The outputs `what` for a checkpoint: <case>/<flavour>.<what>.npz."""
    return np.load(path.with_name(f"{path.name}.{what}.npz"))


def checkpoints_with(what: str, few: tuple[str, ...] = (), quick: tuple[str, ...] = ()):
    """Parametrise over the golden checkpoints that have outputs `what`; unless DSV4_FULL_TESTS is set, over `few`.

    All but the `quick` ones are slow; these are the first of the few, or all where neither is given.
    """
    paths = {case_name(p): p for p in golden_checkpoints() if p.with_name(f"{p.name}.{what}.npz").exists()}
    assert paths, f"no golden case has {what}"
    names = few if few and not FULL else tuple(paths)
    quick = quick or few[:1] or names
    marked = lambda name: pytest.param if name in quick else slow
    return pytest.mark.parametrize("path", [marked(name)(paths[name], id=name) for name in names])


@functools.lru_cache(maxsize=4)
def load_model(path: Path, max_tokens: int = MAX_TOKENS, **options) -> DeepseekV4:
    """A golden checkpoint in float32, no activation rounded unless asked: what most golden outputs are."""
    return checkpoints.load(path, max_tokens=max_tokens, dtype=jnp.float32, **{"numerics": "exact"} | options)


def mean_kl(got, want) -> float:
    """KL(want || got) in nats, averaged over positions."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    log_got, log_want = (x - x.max(-1, keepdims=True) for x in (got, want))
    log_got, log_want = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_got, log_want))
    return float((np.exp(log_want) * (log_want - log_got)).sum(-1).mean())


def assert_logits_close(got, want, profile=F32, top1: float = 1.0) -> None:
    """Largest and mean error, mean KL, and the share of winners that agree where they lead by more than 0.05."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    error = np.abs(got - want)
    errors = (error.max(), error.mean(), mean_kl(got, want))
    assert all(e <= limit for e, limit in zip(errors, profile, strict=True)), errors
    top = np.sort(want, -1)
    clear = top[..., -1] - top[..., -2] > 0.05
    assert (got.argmax(-1) == want.argmax(-1))[clear].mean() >= top1
