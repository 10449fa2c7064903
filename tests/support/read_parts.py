"""One process of several that loads a converted checkpoint over a mesh of eight CPU devices; see test_load_mesh.py.

    python read_parts.py PROCESS PROCESSES PORT CONVERTED OFFICIAL     (XLA_FLAGS says how many devices it has)

Prints a line of JSON for each mesh: bytes read from files, and distinct bytes that its devices hold. Fails unless each
shard has the bits of the official tensor.
"""

from __future__ import annotations

import json
import sys

import jax
import ml_dtypes
import numpy as np
import tensorstore
from jax.sharding import PartitionSpec

import checkpoints
from checkpoints.names import abstract_model, leaf_table, model_leaves
from checkpoints.source import open_source

MESHES = {(8,): ("model",), (2, 4): ("expert", "model"), (4, 2): ("expert", "model")}


def file_bytes() -> int:
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def partition_for(mesh):
    """Experts over one axis, the wider side of a matrix over the other; the flat mesh splits matrices alone."""
    sizes = dict(mesh.shape)

    def partition(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        spec: list[str | None] = [None] * len(shape)
        if len(shape) >= 2:
            wide = len(shape) - (2 if shape[-2] >= shape[-1] else 1)
            if shape[wide] % sizes["model"] == 0:
                spec[wide] = "model"
        if len(shape) >= 3 and "expert" in sizes and shape[0] % sizes["expert"] == 0:
            spec[0] = "expert"
        return PartitionSpec(*spec)

    return partition


def main(process: int, processes: int, port: int, converted: str, official: str) -> None:
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    source = open_source(official)
    table = leaf_table(abstract_model(source.config))
    for shape, names in MESHES.items():
        mesh = jax.make_mesh(shape, names)
        before = file_bytes()
        model = checkpoints.load(
            converted, mesh=mesh, partition=partition_for(mesh), max_tokens=8, dtype=ml_dtypes.bfloat16
        )
        read = file_bytes() - before
        held = 0
        for path, array in model_leaves(model).items():
            seen = set()
            for shard in array.addressable_shards:
                want = source.read(table[path], shard.index).astype(array.dtype)
                assert np.asarray(shard.data).tobytes() == want.tobytes(), (path, shard.index)
                if str(shard.index) not in seen:
                    seen.add(str(shard.index))
                    held += want.size * table[path].stored.itemsize
        print(json.dumps({"mesh": shape, "read": read, "held": held}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:])
