"""What loading a quantised checkpoint takes: its own bytes, and little beside them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import checkpoints
from checkpoints.synth import synth
from dsv4_jax.presets import PRESETS

CHILD = """
import sys, threading, jax, checkpoints
from checkpoints.memory import anonymous_bytes

def watch():
    while not done.wait(0.001):
        seen.append(anonymous_bytes())

warm = checkpoints.load(checkpoints.bundled_path(), max_tokens=16)  # imports and small programs
del warm
before, seen, done = anonymous_bytes(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = checkpoints.load(sys.argv[1], max_tokens=16, dtype="bfloat16")  # the default of accelerators
done.set()
watcher.join()
live = sum(x.nbytes for x in jax.tree.leaves(model))
assert len(seen) > 20
print(live, max(seen) - before)
"""


@pytest.mark.slow
def test_weights_stay_packed_and_the_peak_is_little_more(tmp_path):
    fields = PRESETS["tiny"] | {
        "hidden_size": 512, "num_hidden_layers": 12, "compress_ratios": [0] + [4, 128] * 5 + [4, 0],
        "n_routed_experts": 48, "moe_intermediate_size": 512,
    }  # fmt: skip
    path = synth(fields, tmp_path / "model")
    stored = checkpoints.inspect(path).bytes
    assert stored > 200e6
    out = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
    live, peak = map(int, out.stdout.split())
    assert live <= 1.02 * stored
    assert peak <= 1.15 * stored
