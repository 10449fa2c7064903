"""convert and export: native formats in between, the same bytes at the end, and nothing half-written on the way."""

from __future__ import annotations

import collections
import gc
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint
import pytest
import safetensors
from golden_cases import GOLDEN, case_name, golden_checkpoints

import checkpoints
from checkpoints import CheckpointError
from checkpoints.source import MANIFEST, WEIGHTS

CALM = GOLDEN / "calm" / "fp8"
every_golden = pytest.mark.parametrize("path", golden_checkpoints(), ids=case_name)

# What an array store must call each official dtype, and its bytes there per official byte (expert ids are narrowed).
NATIVE = {
    "BF16": ("bfloat16", 1.0),
    "F32": ("float32", 1.0),
    "I64": ("int32", 0.5),
    "F8_E4M3": ("float8_e4m3fn", 1.0),
    "F8_E8M0": ("uint8", 1.0),
    "I8": ("uint8", 1.0),
}
# Bit patterns that a detour through arithmetic would lose: -0.0, quiet and signalling NaNs with payloads, both signs.
SPECIALS = {
    "F32": ("<u4", [0x80000000, 0x7FC00000, 0x7F800001, 0xFFC12345, 0xFF812345, 0x00000001, 0x7F800000]),
    "BF16": ("<u2", [0x8000, 0x7FC0, 0x7F81, 0xFFC5, 0xFF85, 0x0001, 0xFF80]),
    "F8_E4M3": ("u1", [0x80, 0x7F, 0xFF, 0x01, 0x7E]),
    "F8_E8M0": ("u1", [0xF6, 0x00, 0x01]),  # a NaN or a scale past float32 is refused
    "I8": ("u1", [0x80, 0x08, 0x88, 0xFF, 0x7F]),
}


def files_of(directory: Path) -> dict[str, bytes]:
    """Relative name -> content of every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def assert_same_files(got: Path, want: Path) -> None:
    got_files, want_files = files_of(got), files_of(want)
    assert sorted(got_files) == sorted(want_files)
    assert [name for name in want_files if got_files[name] != want_files[name]] == []


def stored_tensors(directory: Path):
    """(name, dtype, shape) of each tensor, as the safetensors package sees it."""
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            yield name, tensor["dtype"], tensor["shape"], len(tensor["data"])


def leaves_of(model) -> list[tuple[str, np.ndarray]]:
    keyed = jax.tree_util.tree_flatten_with_path(model)[0]
    return [(jax.tree_util.keystr(keys), np.asarray(leaf)) for keys, leaf in keyed]


@pytest.fixture(scope="module")
def calm_converted(tmp_path_factory) -> Path:
    """Read only; tests that change a converted directory copy it."""
    return checkpoints.convert(CALM, tmp_path_factory.mktemp("calm") / "converted")


@pytest.fixture
def broken(calm_converted, tmp_path) -> Path:
    """A converted checkpoint that a test may damage."""
    return shutil.copytree(calm_converted, tmp_path / "broken")


@every_golden
def test_export_of_convert_is_the_same_files(path, tmp_path):
    steps = []
    checkpoints.convert(path, tmp_path / "converted", progress=lambda done, total: steps.append((done, total)))
    exported = checkpoints.export(tmp_path / "converted", tmp_path / "exported")

    assert exported == tmp_path / "exported"
    assert_same_files(exported, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["converted", "exported"]
    weights = sum(nbytes for *_, nbytes in stored_tensors(path))
    assert steps == sorted(steps) and steps[-1] == (weights, weights)


@every_golden
def test_converted_loads_bit_equal(path, tmp_path):
    checkpoints.convert(path, tmp_path / "converted")
    for dtype in ("float32", "bfloat16"):
        official = checkpoints.load(path, max_tokens=64, dtype=dtype)
        converted = checkpoints.load(tmp_path / "converted", max_tokens=64, dtype=dtype)
        pairs = zip(leaves_of(converted), leaves_of(official), strict=True)
        for (got_name, got), (name, want) in pairs:
            assert (got_name, got.dtype, got.shape) == (name, want.dtype, want.shape)
            assert got.tobytes() == want.tobytes(), name


@every_golden
def test_formats_stay_native(path, tmp_path):
    converted = checkpoints.convert(path, tmp_path / "converted")

    expected: collections.Counter[str] = collections.Counter()
    for _, dtype, _, nbytes in stored_tensors(path):
        native, ratio = NATIVE[dtype]
        expected[native] += round(nbytes * ratio)
    stored: collections.Counter[str] = collections.Counter()
    metadata = orbax.checkpoint.PyTreeCheckpointer().metadata((converted / WEIGHTS).resolve()).item_metadata.tree
    for array in metadata.values():
        stored[np.dtype(array.dtype).name] += math.prod(array.shape) * np.dtype(array.dtype).itemsize
    assert stored == expected

    leaves = json.loads((converted / MANIFEST).read_text())["leaves"]
    assert leaves == {p: {"dtype": np.dtype(a.dtype).name, "shape": list(a.shape)} for p, a in metadata.items()}
    source_bytes, converted_bytes = (sum(map(len, files_of(d).values())) for d in (path, converted))
    assert converted_bytes <= 1.1 * source_bytes + 1_000_000


def test_small_files_travel(tmp_path):
    source = shutil.copytree(CALM, tmp_path / "source")
    (source / "tokenizer.json").write_text('{"model": "made up"}')
    (source / "tokenizer_config.json").write_bytes(b'{"bos_token": "\xef\xbd\x9c"}\r\n')
    (source / "LICENSE").write_text("terms\n")
    (source / "encoding").mkdir()
    (source / "encoding" / "notes.txt").write_text("how to encode\n")

    converted = checkpoints.convert(source, tmp_path / "converted")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "encoding/notes.txt"):
        assert (converted / name).read_bytes() == (source / name).read_bytes(), name
    assert_same_files(checkpoints.export(converted, tmp_path / "exported"), source)


def test_checkpoint_without_an_index_stays_without(tmp_path):
    source = shutil.copytree(CALM, tmp_path / "source")
    (source / "model.safetensors.index.json").unlink()
    converted = checkpoints.convert(source, tmp_path / "converted")
    assert_same_files(checkpoints.export(converted, tmp_path / "exported"), source)


def test_reads_through_links(tmp_path):
    """Hub caches are directories of links; what is written are files."""
    source = tmp_path / "source"
    source.mkdir()
    for file in CALM.iterdir():
        (source / file.name).symlink_to(file)
    exported = checkpoints.export(checkpoints.convert(source, tmp_path / "converted"), tmp_path / "exported")
    assert not any(p.is_symlink() for p in exported.iterdir())
    assert_same_files(exported, CALM)


# An array of nothing but -0.0 is one that a store might take for its fill value.
@pytest.mark.parametrize("specials", [slice(None), slice(1)], ids=["all", "minus-zero"])
@pytest.mark.parametrize("flavour", ["fp8", "fp8base"])
def test_special_values_survive(flavour, specials, tmp_path):
    config = json.loads((GOLDEN / "calm" / flavour / "config.json").read_text())
    # Shards of 100 kB, so that experts of one stacked array lie in several files.
    source = checkpoints.synth(config, tmp_path / "source", shard_bytes=100_000)
    assert len(list(source.glob("*.safetensors"))) > 3
    dtypes = set().union(*(fill_with_specials(file, specials) for file in source.glob("*.safetensors")))
    assert dtypes == {"F32", "BF16", "F8_E4M3"} | ({"F8_E8M0", "I8"} if flavour == "fp8" else set())

    converted = checkpoints.convert(source, tmp_path / "converted")
    assert_same_files(checkpoints.export(converted, tmp_path / "exported"), source)


def fill_with_specials(file: Path, specials: slice) -> set[str]:
    """Overwrite every tensor of a shard, but for the expert ids, with special bits; the dtypes it met."""
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    entries = {name: entry for name, entry in header.items() if name != "__metadata__" and entry["dtype"] != "I64"}
    for name, entry in entries.items():
        word, patterns = SPECIALS[entry["dtype"]]
        if name.endswith(".scale") and entry["dtype"] == "F32":
            patterns = [0x80000000, 0x00000001, 0x7B000000]  # -0.0, the smallest there is, the largest allowed
        begin, end = (start + offset for offset in entry["data_offsets"])
        words = np.array(patterns[specials], word)
        content[begin:end] = np.resize(words, (end - begin) // words.itemsize).tobytes()
    file.write_bytes(content)
    return {entry["dtype"] for entry in entries.values()}


@pytest.mark.parametrize("verb", [checkpoints.convert, checkpoints.export], ids=["convert", "export"])
def test_existing_destination(verb, calm_converted, tmp_path):
    source = CALM if verb is checkpoints.convert else calm_converted
    destination = tmp_path / "there"
    destination.mkdir()
    (destination / "mine.txt").write_text("keep")

    with pytest.raises(CheckpointError, match=r"there: exists; .*force"):
        verb(source, destination)
    assert files_of(destination) == {"mine.txt": b"keep"}

    verb(source, destination, force=True)
    assert not (destination / "mine.txt").exists()
    checkpoints.load(destination, max_tokens=8)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_destination_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.below: cannot be written"):
        checkpoints.convert(CALM, tmp_path / "file" / "below")


@pytest.mark.parametrize("verb", [checkpoints.convert, checkpoints.export], ids=["convert", "export"])
def test_interrupted_replacement_keeps_the_old(verb, calm_converted, tmp_path, monkeypatch):
    destination = tmp_path / "there"
    destination.mkdir()
    (destination / "old.txt").write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises((CheckpointError, OSError), match="No space left"):
        verb(CALM if verb is checkpoints.convert else calm_converted, destination, force=True)
    assert files_of(destination) == {"old.txt": b"old"}


def test_bad_source_leaves_nothing(tmp_path):
    source = shutil.copytree(CALM, tmp_path / "source")
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors"):
        checkpoints.convert(source, tmp_path / "converted")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_convert_refuses_converted_and_export_refuses_official(calm_converted, tmp_path):
    with pytest.raises(CheckpointError, match="is a converted checkpoint already; give the official one"):
        checkpoints.convert(calm_converted, tmp_path / "again")
    with pytest.raises(CheckpointError, match="is not a converted checkpoint; export reads"):
        checkpoints.export(CALM, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def no_manifest(directory: Path) -> None:
    (directory / MANIFEST).unlink()


def half_manifest(directory: Path) -> None:
    content = (directory / MANIFEST).read_bytes()
    (directory / MANIFEST).write_bytes(content[: len(content) // 2])


def edit_manifest(**fields):
    def edit(directory: Path) -> None:
        manifest = json.loads((directory / MANIFEST).read_text())
        (directory / MANIFEST).write_text(json.dumps(manifest | fields))

    return edit


def manifest_is_a_list(directory: Path) -> None:
    (directory / MANIFEST).write_text("[]")


def manifest_has_only_its_head(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({key: manifest[key] for key in ("format", "complete")}))


@pytest.mark.parametrize("verb", ["load", "export", "inspect"])
@pytest.mark.parametrize(
    "damage, says",
    [
        (no_manifest, r"manifest\.json: cannot be read .*run `dsv4 convert` again"),
        (half_manifest, r"manifest\.json: cannot be read .*run `dsv4 convert` again"),
        (edit_manifest(complete=False), r"manifest\.json: .*complete=False; .*run `dsv4 convert` again"),
        (edit_manifest(format="dsv4-jax/999"), r"manifest\.json: format 'dsv4-jax/999'.*run `dsv4 convert` again"),
        (manifest_is_a_list, r"manifest\.json: .*`dsv4 convert` again"),
        (manifest_has_only_its_head, r"manifest\.json: .*`dsv4 convert` again"),
    ],
    ids=["missing", "half", "incomplete", "other-format", "list", "head-only"],
)
def test_incomplete_directory(verb, damage, says, broken, tmp_path):
    damage(broken)
    with pytest.raises(CheckpointError, match=says):
        run(verb, broken, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def run(verb: str, path: Path, out: Path) -> None:
    checkpoints.export(path, out) if verb == "export" else getattr(checkpoints, verb)(path)


def no_weights(directory: Path) -> None:
    shutil.rmtree(directory / WEIGHTS)


def no_data_files(directory: Path) -> None:
    for file in (directory / WEIGHTS).glob("*/c/**/*"):
        file.unlink() if file.is_file() else None


def short_data_file(directory: Path) -> None:
    file = max((directory / WEIGHTS).rglob("0"), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def half_structure(directory: Path) -> None:
    file = directory / WEIGHTS / "_METADATA"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("verb", ["load", "export"])
@pytest.mark.parametrize("damage", [no_weights, no_data_files, short_data_file, half_structure])
def test_damaged_weights(verb, damage, broken, tmp_path):
    damage(broken)
    kind, message = failure_of(lambda: run(verb, broken, tmp_path / "exported"))
    assert kind is CheckpointError, message[:200]
    assert re.search(r"broken.weights.*: .*run `dsv4 convert` again", message), message[:200]
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def failure_of(call: Callable[[], object]) -> tuple[type[BaseException] | None, str]:
    """What a call raises, its traceback dropped here: one out of Orbax's readers holds coroutines that die noisily."""
    try:
        call()
        return None, "nothing was raised"
    except Exception as error:
        return type(error), " ".join(str(error).split())
    finally:
        gc.collect()


def test_converted_without_config(broken):
    (broken / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing; copy"):
        checkpoints.load(broken)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"vocab_size": 200}, r"broken: .*is .*\[192, .*config\.json asks for .*\[200, "),
        ({"num_nextn_predict_layers": 0}, r"broken: does not fit its config\.json .*mtp\.0\..*convert again"),
    ],
    ids=["shape", "leaves"],
)
def test_converted_with_another_config(change, says, broken):
    fields = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(CheckpointError, match=says):
        checkpoints.load(broken)
