"""Kills a conversion at random points with SIGKILL and runs it again; run as a script by test_resume.py.

    python kill_points.py SOURCE SCRATCH POINTS SEED BAND_BYTES

A fresh interpreter imports what is needed and forks a child for each conversion. A child kills itself at its n-th
event: an operation on a file below SCRATCH (an audit event, which comes before the operation) or a finished band, so
points lie in the middle of files and in every step of the finish. Prints one JSON object; fails with an AssertionError.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import checkpoints
from checkpoints.journal import read_entries

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile", "fcntl.flock"}
OLD = {"old.txt": b"what was there before"}


def in_child(action: Callable[[], object]) -> int:
    """Run it in a forked child; its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def convert_until(source: Path, destination: Path, band_bytes: int, force: bool, last: int | None, count: Path) -> None:
    """Convert; SIGKILL at event number `last`. Without one, leave the number of events in `count`."""
    sys.modules["checkpoints.convert"].MOST_BAND = band_bytes  # the package has a function of that name
    events, lock, scratch = 0, threading.Lock(), str(destination.parent)

    def event() -> None:
        nonlocal events
        with lock:
            events += 1
            if events == last:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(name: str, args: tuple) -> None:
        if name in EVENTS and args and (name == "fcntl.flock" or str(args[0]).startswith(scratch)):
            event()

    sys.addaudithook(hook)
    checkpoints.convert(source, destination, force=force, workers=3, progress=lambda done, total: event())
    if last is None:
        count.write_text(str(events))


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def stamps_of_finished(destination: Path) -> dict[str, tuple[int, int]]:
    """(inode, mtime) of each file that the journal calls finished."""
    journal, work = (destination.with_name(f".{destination.name}.{end}") for end in ("journal", "partial"))
    if not journal.exists():
        return {}
    names = [name for name in read_entries(journal.read_bytes()) if (work / name).exists()]
    return {name: (about.st_ino, about.st_mtime_ns) for name in names if (about := (work / name).stat())}


def check_stopped(destination: Path, reference: dict[str, bytes], had_old: bool) -> None:
    """After a kill: nothing half-done loads, and what was there before is still to be found."""
    work, aside = (destination.with_name(f".{destination.name}.{end}") for end in ("partial", "replaced"))
    if work.exists():
        with contextlib.suppress(checkpoints.CheckpointError):
            checkpoints.load(work, max_tokens=8)
            raise AssertionError("an unfinished directory loads")
    found = files_of(destination) if destination.exists() else None
    if found is None:
        assert not had_old or files_of(aside) == OLD, "what was replaced is gone before its successor is there"
        assert not had_old or files_of(work) == reference
    else:
        assert found == reference or (had_old and found == OLD), "the destination is neither old nor whole"


def run(source: Path, scratch: Path, points: int, seed: int, band_bytes: int) -> dict[str, object]:
    destination, count = scratch / "converted", scratch / "count"
    assert in_child(lambda: convert_until(source, destination, band_bytes, False, None, count)) == 0
    total, reference = int(count.read_text()), files_of(destination)
    random_points = random.Random(seed)
    # Half anywhere, a quarter each in the first tenth and in the last, where the finish is.
    spans = [(1, total), (1, total), (1, total // 10), (total - total // 10, total)]
    where = [random_points.randint(*spans[n % 4]) for n in range(points)]
    kept = killed = 0
    for number, last in enumerate(where):
        for path in [*scratch.glob(".converted.*"), destination]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        force = number % 8 >= 4  # with something to replace
        if force:
            destination.mkdir()
            for name, content in OLD.items():
                (destination / name).write_bytes(content)
        status = in_child(lambda f=force, n=last: convert_until(source, destination, band_bytes, f, n, count))
        assert os.WIFSIGNALED(status) or status == 0, f"event {last}: the conversion failed"
        killed += os.WIFSIGNALED(status)
        assert in_child(lambda f=force: check_stopped(destination, reference, f)) == 0, f"killed at event {last}"
        before = stamps_of_finished(destination)
        resumed = in_child(lambda f=force: convert_until(source, destination, band_bytes, f, None, count))
        assert resumed == 0, f"killed at event {last}: the second run failed"
        assert files_of(destination) == reference, f"killed at event {last}: the result differs"
        left = {p.name for p in scratch.iterdir()} - {"converted", "count"}
        assert not left, f"killed at event {last}: {left} left behind"
        after = {n: (about.st_ino, about.st_mtime_ns) for n in before if (about := (destination / n).stat())}
        assert after == before, f"killed at event {last}: finished files were written again"
        kept += len(before)
    return {"events": total, "points": sorted(where), "killed": killed, "files_kept": kept, "files": len(reference)}


if __name__ == "__main__":
    paths, numbers = map(Path, sys.argv[1:3]), map(int, sys.argv[3:])
    print(json.dumps(run(*paths, *numbers)))
