"""Hub ids: `deepseek-ai/DeepSeek-V4-Flash`, with `@revision` if wanted, to a directory in the hub library's cache."""

from __future__ import annotations

import re
from pathlib import Path

from checkpoints.errors import CheckpointError

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(@(?P<revision>[\w./-]+))?")
NOT_OURS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]  # weights in other formats


def local_path(path: str | Path) -> Path:
    """The directory of a checkpoint: `path` itself if it exists or is no hub id, else what the hub library downloads.

    Its cache keeps what is complete and resumes what is not; HF_HUB_OFFLINE=1 forbids the network.

    Raises:
      CheckpointError: a hub id that cannot be had; the message says what to install or what the hub answered.
    """
    found = HUB_ID.fullmatch(str(path))
    if Path(path).exists() or found is None:
        return Path(path)
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{path}: no such directory; to download it as a hub id, install the extra: pip install 'dsv4-jax[hub]'"
        ) from None
    try:
        directory = huggingface_hub.snapshot_download(
            found["repo"], revision=found["revision"], ignore_patterns=NOT_OURS
        )
    except (OSError, ValueError) as error:  # its HTTP, cache and name errors are all of these
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: no such directory, and not to be had from the hub ({reason})") from error
    return Path(directory)
