"""Checkpoints: the official format in, models out, and back."""

from pathlib import Path

from checkpoints.convert import Plan, convert, plan
from checkpoints.errors import CheckpointError
from checkpoints.export import export
from checkpoints.inspection import Inspection, inspect
from checkpoints.load import load
from checkpoints.synth import synth
from checkpoints.tokenizer import load_tokenizer
from checkpoints.verify import Verification, VerificationError, verify


def bundled_path() -> Path:
    """The small checkpoint that comes with the package."""
    return Path(__file__).parent / "bundled"


__all__ = [
    "CheckpointError",
    "Inspection",
    "Plan",
    "Verification",
    "VerificationError",
    "bundled_path",
    "convert",
    "export",
    "inspect",
    "load",
    "load_tokenizer",
    "plan",
    "synth",
    "verify",
]
