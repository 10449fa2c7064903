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
from golden_cases import FULL, QUICK_XLA

from dsv4_jax.processes import join

ROOT = Path(__file__).parents[2]
CASE = ROOT / "tests" / "golden" / "calm" / "fp8"


def start(processes: int, devices: int, prompt: Path, new: int) -> list[subprocess.Popen]:
    """The processes of one run, each with so many simulated devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = f"{QUICK_XLA} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "dsv4_jax.cli", "generate", CASE, "--tokens", prompt, "--numerics", "exact"]
    command += ["--max-new-tokens", new, "--json", "--coordinator", f"localhost:{port}", "--processes", processes]
    return [
        subprocess.Popen(
            list(map(str, [*command, "--process-id", i])), cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(processes)
    ]  # fmt: skip


@pytest.fixture
def golden(tmp_path) -> tuple[Path, list]:
    """A file with the golden prompt, and what should follow."""
    found = np.load(f"{CASE}.greedy.npz")
    np.save(tmp_path / "prompt.npy", found["prompt_ids"].astype(np.int32))
    return tmp_path / "prompt.npy", found["tokens"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices", [(2, 2), (4, 1)] if FULL else [(4, 1)])
def test_processes_agree_and_one_speaks(processes, devices, golden):
    prompt, want = golden
    running = start(processes, devices, prompt, 8)
    outputs = [process.communicate(timeout=500) for process in running]
    assert [process.returncode for process in running] == [0] * processes, outputs[0][1][-3000:]
    assert json.loads(outputs[0][0].splitlines()[-1])["tokens"] == [want[0][:8]]
    assert not any("tokens" in out for out, _ in outputs[1:])


@pytest.mark.slow
def test_a_death_ends_the_others_within_a_minute(golden):
    """One of two is killed once both have joined; the other waits for it in a collective, and must not for ever."""
    running = start(2, 1, golden[0], 4000)
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
