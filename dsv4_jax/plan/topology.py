"""Names of slices and GPU nodes, and the devices that stand for them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import jax

from pallas_kernels import aot
from pallas_kernels.chips import CHIPS, GPUS, TPUS, Chip

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # v5e and v6e: up to 256 chips
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")  # v5p and v7x
SHAPES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBES, "v7x": CUBES}
DEVICES_A_CHIP = {"v7x": 2}
LIBTPU_NAME = {"v7x": "tpu7x"}
NODES = (1, 2, 4, 8, 16, 32)  # GPUs


@dataclass(frozen=True)
class Topology:
    """A slice of TPU chips in a shape such as "4x4", or GPUs of one kind ("8")."""

    chip: Chip
    shape: str

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape}" if self.chip.platform == "tpu" else f"{self.chip.name}x{self.shape}"

    @property
    def chips(self) -> int:
        return math.prod(int(side) for side in self.shape.split("x"))

    @property
    def devices(self) -> int:
        """How many devices JAX sees."""
        return self.chips * DEVICES_A_CHIP.get(self.chip.name, 1)

    def make_devices(self) -> list[jax.Device]:
        """Devices to compile for. Raises AotUnavailable where the compiler is not installed."""
        if self.chip.platform == "cuda":
            return aot.gpu_devices(self.chip, self.chips)
        return aot.tpu_devices(self.chip, f"{LIBTPU_NAME.get(self.chip.name, self.chip.name)}:{self.shape}")

    def larger(self) -> list[Topology]:
        """The usual ones of this kind with more chips, smallest first."""
        return [other for other in usual(self.chip) if other.chips > self.chips]


def usual(chip: Chip) -> list[Topology]:
    """The slices or nodes of a chip that one rents, smallest first."""
    return [Topology(chip, str(shape)) for shape in SHAPES.get(chip.name, NODES)]


def parse_topology(text: str) -> Topology:
    """ "v6e:4x4", or a number of chips, "v6e-16", for a slice; "H200x8" for GPUs.

    Raises:
      ValueError: names the ones there are.
    """
    gpu = re.fullmatch(r"([A-Za-z]\w*?)x(\d+)", text)
    if gpu and gpu[1] in GPUS and int(gpu[2]):
        return Topology(CHIPS[gpu[1]], gpu[2])
    tpu = re.fullmatch(r"(?:tpu)?(v?\w+?)(?::(\d+(?:x\d+)+)|-(\d+))", text)
    name = {"7x": "v7x", "v5litepod": "v5e"}.get(tpu[1], tpu[1]) if tpu else ""
    if tpu and name in TPUS:
        chip = CHIPS[name]
        found = [Topology(chip, tpu[2])] if tpu[2] else [t for t in usual(chip) if t.chips == int(tpu[3])]
        if found and all(map(int, found[0].shape.split("x"))):
            return found[0]
        raise ValueError(f"topology {text!r}: {name} slices are {', '.join(t.name for t in usual(chip))}")
    raise ValueError(
        f"topology {text!r} is not known: write v6e:4x4 (shape) or v6e-16 (chips) with one of {', '.join(TPUS)}, "
        f"or H200x8 (GPUs) with one of {', '.join(GPUS)}"
    )
