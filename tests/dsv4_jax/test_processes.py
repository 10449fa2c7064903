"""`dsv4 generate` as several processes on this machine: one set of tokens, printed once; a death ends all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from golden_cases import FULL, GOLDEN, QUICK_XLA, case_name, greedy_checkpoints

from dsv4_jax.processes import join

ROOT = Path(__file__).parents[2]
CASE = GOLDEN / "calm" / "fp8"
EVERY = [
    pytest.param(path, *run, id=f"{case_name(path)}-{run}") for path in greedy_checkpoints() for run in ((2, 2), (4, 1))
]


def start(processes: int, devices: int, prompt: Path, new: int, path: Path = CASE) -> list[subprocess.Popen]:
    """The processes of one run, each with so many simulated devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = f"{QUICK_XLA} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "dsv4_jax.cli", "generate", path, "--tokens", prompt, "--numerics", "exact"]
    command += ["--max-new-tokens", new, "--json", "--coordinator", f"localhost:{port}", "--processes", processes]
    return [
        subprocess.Popen(
            list(map(str, [*command, "--process-id", i])), cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(processes)
    ]  # fmt: skip


def golden(path: Path, directory: Path) -> tuple[Path, list]:
    """A file with the golden prompt, and what should follow."""
    found = np.load(f"{path}.greedy.npz")
    np.save(directory / "prompt.npy", found["prompt_ids"].astype(np.int32))
    return directory / "prompt.npy", found["tokens"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("path, processes, devices", EVERY if FULL else [(CASE, 4, 1)])
def test_processes_agree_and_one_speaks(path, processes, devices, tmp_path):
    prompt, want = golden(path, tmp_path)
    running = start(processes, devices, prompt, 8, path)
    outputs = [process.communicate(timeout=500) for process in running]
    assert [process.returncode for process in running] == [0] * processes, outputs[0][1][-3000:]
    assert json.loads(outputs[0][0].splitlines()[-1])["tokens"] == [want[0][:8]]
    assert not any("tokens" in out for out, _ in outputs[1:])


@pytest.mark.slow
def test_a_death_ends_the_others_within_a_minute(tmp_path):
    """One of two is killed once both have joined; the other waits for it in a collective, and must not for ever."""
    running = start(2, 1, golden(CASE, tmp_path)[0], 4000)
    deadline = time.monotonic() + 300
    for line in running[0].stderr:  # the cache's size is printed when the weights are there, on all processes
        if "cache of a sequence" in line:
            break
        assert time.monotonic() < deadline
    time.sleep(3)
    running[1].kill()
    killed = time.monotonic()
    _, err = running[0].communicate(timeout=90)
    running[1].communicate()
    assert running[0].returncode not in (0, None)
    assert time.monotonic() - killed < 60
    assert any(word in err.lower() for word in ("heartbeat", "connection", "unavailable", "closed", "task")), err[
        -2000:
    ]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("localhost:1", 2, None), "give --coordinator HOST:PORT, --processes N and --process-id I together"),
        (("localhost", 2, 0), "--coordinator localhost: write HOST:PORT"),
        (("localhost:1", 2, 2), "--process-id 2 must be between 0 and --processes 2 - 1"),
        ((None, None, None), "no cluster was detected"),
    ],
)
def test_bad_arguments(arguments, says, monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=says):
        join(*arguments)
