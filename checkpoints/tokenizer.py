"""The tokenizer that lies beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints.errors import CheckpointError
from checkpoints.hub import local_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The directory's tokenizer.json, or None where there is none. Raises CheckpointError if it cannot be read."""
    from tokenizers import Tokenizer

    file = local_path(path) / "tokenizer.json"
    if not file.exists():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
