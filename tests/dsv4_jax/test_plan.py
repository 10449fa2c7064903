"""dsv4 plan: names of slices, exact sizes from shapes, the verdict; and one small model compiled for a TPU slice."""

from __future__ import annotations

import json

import pytest

from checkpoints.synth import with_layers
from dsv4_jax import plan as planning
from dsv4_jax.cli import main
from dsv4_jax.plan import parse_topology, plan, sweep
from dsv4_jax.plan.measure import collectives
from dsv4_jax.presets import PRESETS
from pallas_kernels import aot

GIB = 2**30


@pytest.mark.parametrize(
    "text, name, devices",
    [
        ("v6e:4x4", "v6e:4x4", 16),
        ("v6e-8", "v6e:2x4", 8),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5p:2x2x2", "v5p:2x2x2", 8),
        ("tpu7x:2x2x1", "v7x:2x2x1", 8),
        ("v7x-4", "v7x:2x2x1", 8),
        ("H200x8", "H200x8", 8),
        ("B200x1", "B200x1", 1),
    ],
)
def test_topologies(text, name, devices):
    found = parse_topology(text)
    assert (found.name, found.devices) == (name, devices)


@pytest.mark.parametrize("text", ["", "v6e", "v9:2x2", "H200", "H200x0", "v6e-7", "T4x2"])
def test_unknown_topologies(text):
    with pytest.raises(ValueError, match="v6e"):
        parse_topology(text)


def test_sizes_of_flash_and_the_verdict():
    """158.07 GB of published tensors, of which a device of 16 holds its experts and all of the rest."""
    found = plan(PRESETS["flash"], parse_topology("v6e:4x4"), batch=64, context=131072, compiled=False)
    assert found.mesh == {"data": 1, "expert": 16, "model": 1} and found.fits
    assert 17 * GIB < found.weights < 18 * GIB and found.needed == found.weights + found.cache
    assert found.tokens_per_second == found.batch / found.step_seconds
    tight = plan(PRESETS["flash"], parse_topology("v6e:2x2"), batch=4, context=4096, compiled=False)
    assert not tight.fits and "would hold it" in tight.suggestion
    none = plan(PRESETS["pro"], parse_topology("B200x1"), batch=1, context=4096, compiled=False, mesh="latency")
    assert not none.fits and "B200x" in none.suggestion


@pytest.mark.slow
def test_more_context_and_more_sequences_take_more():
    rows = sweep(PRESETS["flash"], parse_topology("v5p:2x2x2"), [1, 8, 64], [4096, 131072])
    assert [row["batch"] for row in rows] == [8, 64, 8, 64]  # filled up to the shards of the mesh
    assert rows[0]["cache"] < rows[2]["cache"] < rows[3]["cache"]
    assert rows[0]["step_seconds"] < rows[1]["step_seconds"]


def test_wrong_mesh():
    with pytest.raises(ValueError, match="is for 4 devices, the topology has 16"):
        plan(PRESETS["flash"], parse_topology("v6e:4x4"), mesh="expert=4", compiled=False)


def test_collectives_are_counted():
    hlo = """
      %a.1 = bf16[4,128]{1,0} all-gather(%x), dimensions={0}
      ROOT %b = (f32[8]{0}, f32[16]{0}) all-reduce-start(%y), to_apply=%add
      %c = f32[2,2]{1,0} add(%p, %q)
    """
    assert collectives(hlo) == {"all-reduce": {"count": 1, "bytes": 64}, "all-gather": {"count": 1, "bytes": 1024}}


@pytest.fixture
def dsv4(capsys):
    """The command in this process: (exit status, stdout, stderr)."""

    def run(*args):
        status = main([str(arg) for arg in args])
        return (status, *capsys.readouterr())

    return run


def test_command(dsv4, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which the command sets, and this process should not keep
    options = ["--topology", "v6e:4x4", "--no-compile", "--batch", "16", "--context", "16384"]
    status, out, err = dsv4("plan", "flash", *options, "--sweep", "--chart", tmp_path / "chart.png", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["fits"] and len(found["sweep"]) == 2 and (tmp_path / "chart.png").stat().st_size > 10_000
    status, out, _ = dsv4("plan", "flash", "--topology", "v6e:2x2", "--no-compile")
    assert status == 1 and "does not fit" in out
    status, _, err = dsv4("plan", "nothing", "--topology", "v6e:2x2")
    assert status == 1 and "neither a file, nor a checkpoint" in err


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not aot.available("tpu"), reason="needs libtpu: pip install 'dsv4-jax[aot]'")
def test_a_slice_is_compiled_for():
    """The real steps for eight chips: tokens travel to their experts, temporaries are small, nothing is allocated."""
    fields = with_layers(PRESETS["flash"], 4) | {"n_routed_experts": 32}
    found = planning.plan(fields, parse_topology("v6e:2x4"), batch=16, context=8192, prefill_tokens=64)
    assert found.fits, found.errors
    assert found.decode["collectives"]["all-to-all"]["count"] >= 4 * 4
    assert found.decode["temporaries"] < 0.03 * found.hbm


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not aot.available("cuda"), reason="needs XLA's compiler for CUDA: pip install 'dsv4-jax[aot]'")
@pytest.mark.parametrize("mesh", ["expert=8", "expert=2,model=4"])
def test_a_gpu_node_is_compiled_for(mesh):
    """Lanes are streams there, and XLA places neither collectives nor scans on them."""
    fields = with_layers(PRESETS["flash"], 4) | {"n_routed_experts": 32}
    found = planning.plan(fields, parse_topology("H200x8"), mesh=mesh, batch=8, context=8192, prefill_tokens=512)
    assert found.fits, found.errors
    assert found.decode["collectives"]["all-to-all"]["count"] >= 4 * 4
    assert found.prefill["collectives"]["all-to-all"]["count"] >= 4 * 4
