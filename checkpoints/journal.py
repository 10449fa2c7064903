"""What a conversion has finished, on disk: one line a file, appended when the file has its name and its bytes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints.errors import CheckpointError

READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Entry:
    """A finished file: its name in the destination, size, SHA-256, and a digest of all it was made from."""

    file: str
    bytes: int
    sha256: str
    origin: str


class Journal:
    """An append-only file beside the unfinished directory, locked against a second writer while open.

    A line that a kill or a full disk cut short is ignored, so its file counts as not written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._handle = _open_locked(path)
        text = path.read_bytes()
        self.entries = read_entries(text)
        if text and not text.endswith(b"\n"):
            os.write(self._handle, b"\n")

    def add(self, entry: Entry) -> None:
        line = json.dumps(asdict(entry)).encode() + b"\n"
        with self._lock:
            if os.write(self._handle, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self.entries[entry.file] = entry

    def close(self) -> None:
        os.close(self._handle)


def _open_locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise CheckpointError(f"{path}: another process is converting to this destination; wait for it") from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the writer before us finished and removed the file between our two steps


def read_entries(text: bytes) -> dict[str, Entry]:
    """The finished files of a journal by name; the last line of a name counts."""
    found = (_parse(line) for line in text.splitlines())
    return {entry.file: entry for entry in found if entry}


def _parse(line: bytes) -> Entry | None:
    try:
        return Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces, as `sha256sum` prints it."""
    with open(path, "rb") as handle:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
        while count := handle.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
