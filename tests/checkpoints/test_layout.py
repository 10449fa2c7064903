"""Arrays on disk: what we lay out by hand is what TensorStore, Orbax and the zarr format understand."""

from __future__ import annotations

import math

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from checkpoints import layout
from checkpoints.convert import tile_bytes
from checkpoints.layout import Layout, cut, orbax_metadata

FLASH = {
    "gate_up": ((256, 2, 2048, 2048), 1),
    "gate_up scale": ((256, 2, 2048, 128), 1),
    "down": ((256, 4096, 1024), 1),
    "down scale": ((256, 4096, 64), 1),
    "embedding": ((129280, 4096), 2),
    "q_b": ((32768, 1024), 1),
    "hash table": ((129280, 6), 4),
}


def write(directory, array: np.ndarray, form: Layout, band_bytes: int) -> None:
    """By the layout's own iterators, as the converter does."""
    buffer = np.empty(max(band_bytes, array.nbytes), np.uint8)
    directory.mkdir(parents=True)
    (directory / "zarr.json").write_bytes(form.metadata())
    for name, start in form.files():
        content = b""
        for outer, rows, columns in form.bands(start, band_bytes):
            matrix = array[outer].reshape((1, 1, *array.shape)[-2:])
            content += bytes(tile_bytes(form, matrix[slice(*rows), slice(*columns)], buffer))
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content + form.table())
        assert len(content) + len(form.table()) == form.file_bytes


def read(directory) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(directory)}}
    return tensorstore.open(spec, open=True).result().read().result()


sides = st.sampled_from([1, 2, 3, 5, 8, 12, 24, 30, 64, 97])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(sides, max_size=4).filter(lambda s: math.prod(s) <= 60_000).map(tuple),
    dtype=st.sampled_from(["uint8", "int32", "float32", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]),
    least=st.sampled_from([1, 64, 4096]),
    most=st.sampled_from([16, 256, 1 << 20]),
    file_bytes=st.sampled_from([64, 1000, 1 << 20]),
    band_bytes=st.sampled_from([1, 500, 1 << 20]),
)
def test_tensorstore_reads_what_is_written(tmp_path_factory, shape, dtype, least, most, file_bytes, band_bytes):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LEAST_TILE": least, "MOST_TILE": most, "FILE_BYTES": file_bytes}.items():
            patch.setattr(layout, name, value)
        dtype = np.dtype(dtype)
        form = cut(shape, dtype)
    for size, block, tile in zip(shape, form.block, form.tile, strict=True):
        assert size % block == 0 and block % tile == 0
    bits = np.random.default_rng(0).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    array = bits.view(dtype).reshape(shape)
    directory = tmp_path_factory.mktemp("array") / "a"
    write(directory, array, form, band_bytes)
    got = read(directory)
    assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, shape, array.tobytes())


def test_orbax_restores_a_directory_of_them(tmp_path):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 127, (4, 2, 64, 512), np.uint8).view(ml_dtypes.float8_e4m3fn)
    arrays = {"a.b.data": codes, "a.b.scale": rng.integers(0, 255, (300, 7), np.uint8), "c": np.float32([1, 2, 3])}
    for path, array in arrays.items():
        write(tmp_path / path, array, cut(array.shape, array.dtype), 1 << 20)
    for name, content in orbax_metadata(list(arrays)).items():
        (tmp_path / name).write_bytes(content)
    sharding = SingleDeviceSharding(jax.devices()[0])
    arguments = {path: orbax.checkpoint.ArrayRestoreArgs(sharding=sharding) for path in arrays}
    restored = orbax.checkpoint.PyTreeCheckpointer().restore(tmp_path, restore_args=arguments)
    assert {p: (a.dtype, a.shape) for p, a in restored.items()} == {p: (a.dtype, a.shape) for p, a in arrays.items()}
    assert all(np.asarray(restored[path]).tobytes() == array.tobytes() for path, array in arrays.items())


@pytest.mark.parametrize("name", FLASH)
def test_sizes_of_the_published_shapes(name):
    """Tiles neither tiny nor large, files of at most 256 MiB, few of them; eight devices on an axis read at most 2x."""
    shape, itemsize = FLASH[name]
    form = cut(shape, np.dtype(f"u{itemsize}"))
    tile, block = (math.prod(part) * itemsize for part in (form.tile, form.block))
    assert 16 << 10 <= tile <= 1 << 20 and block <= 256 << 20
    assert math.prod(shape) * itemsize / block <= 8 and 16 / tile < 0.001
    for axis in (-2, -1):
        share = shape[axis] / 8
        assert form.tile[axis] <= 2 * share or shape[axis] < 64


def test_a_prime_side_makes_one_file_and_not_thousands():
    form = cut((129_281, 4096), np.dtype(np.uint16))
    assert len(list(form.files())) == 1 and math.prod(form.tile) * 2 <= 1 << 20
