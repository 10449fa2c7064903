"""save: what was in memory is on disk, bit for bit, and what does not fit is refused."""

import jax
import numpy as np
import pytest

import checkpoints
from checkpoints.errors import CheckpointError
from checkpoints.names import model_leaves
from checkpoints.save import save
from dsv4_jax.presets import PRESETS

CONFIG = PRESETS["tiny"] | {"num_hidden_layers": 2, "compress_ratios": [0, 4, 0], "num_hash_layers": 1}


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    model = checkpoints.load(checkpoints.synth(CONFIG, tmp_path_factory.mktemp("synth") / "model", seed=3))
    return jax.device_get(model_leaves(model))


def test_round_trip_is_bit_exact(arrays, tmp_path):
    again = model_leaves(checkpoints.load(save(arrays, CONFIG, tmp_path / "saved")))
    assert again.keys() == arrays.keys()
    for path, want in arrays.items():
        np.testing.assert_array_equal(np.asarray(again[path]).view(np.uint8), want.view(np.uint8), err_msg=path)


def test_what_does_not_fit_is_named(arrays, tmp_path):
    path = "layers.0.self_attn.kv_proj.data"
    for wrong, match in (
        (arrays | {path: arrays[path][1:]}, r"kv_proj.data: has shape \(127, 128\), the config needs \(128, 128\)"),
        ({name: x for name, x in arrays.items() if name != path}, "kv_proj.data: has shape None"),
        (arrays | {"layers.7.stray": arrays[path]}, "layers.7.stray: the config's model has no such parameter"),
    ):
        with pytest.raises(CheckpointError, match=match):
            save(wrong, CONFIG, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
