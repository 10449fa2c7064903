"""What this process holds in memory of its own."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path

import numpy as np

CACHE_LINE = 64  # bytes


def anonymous_bytes() -> int:
    """Resident bytes that no file backs; the page cache and mapped files do not count.

    Where the system does not tell (no /proc), the peak of the whole resident set so far.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["RssAnon"].split()[0]) << 10
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array without contents that a CPU device takes as it is, with no copy: it begins on a cache line."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + size].view(dtype).reshape(shape)
