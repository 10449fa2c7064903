"""What a kernel may know about the chip it is compiled for: plain figures, given as arguments, never queried.

All figures are for one JAX device: a whole chip, except on TPU v7x, whose chip shows as two devices.

Sources: the Cloud TPU system architecture pages (peaks, HBM, VMEM) and NVIDIA's A100, H100, H200 and B200 data sheets
(dense peaks, SXM boards). TPU clocks are those with which the compiler's own flops per cycle give the published peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30
MIB = 1 << 20
KIB = 1 << 10


@dataclass(frozen=True)
class Chip:
    """Facts about one JAX device.

    name: what it is asked for by ("v5e", "H200"); platform: JAX's name for its lowering.
    generation: of a TPU (5, 6, 7), or the compute capability of a GPU times ten (80, 90, 100).
    cores: TensorCores, or streaming multiprocessors.
    clock_hz: of the cores, boosted on GPUs.
    hbm_bytes, hbm_bytes_per_s: memory a program may use, and its peak bandwidth.
    vmem_bytes: vector memory of one TensorCore (0 on GPUs).
    smem_bytes: shared memory one thread block may ask for (0 on TPUs).
    bf16_flops, fp8_flops: peak flop/s, dense; fp8_flops is bf16_flops where fp8 operands are widened first.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    generation: int
    cores: int
    clock_hz: float
    hbm_bytes: int
    hbm_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float
    vmem_bytes: int = 0
    smem_bytes: int = 0

    @property
    def has_fp8_mxu(self) -> bool:
        """Whether the matrix unit multiplies fp8 codes faster than bf16 values."""
        return self.fp8_flops > self.bf16_flops

    @property
    def has_fp4_mxu(self) -> bool:
        """Whether the matrix unit takes e2m1 codes: that of TPU v7x."""
        return self.platform == "tpu" and self.generation >= 7

    @property
    def flops_per_cycle(self) -> float:
        """Peak bf16 flops of one core in one cycle."""
        return self.bf16_flops / self.clock_hz / self.cores

    @property
    def cuda_arch(self) -> str:
        """The code target of a GPU: "sm_80", "sm_90a", "sm_100a"; the suffix unlocks wgmma and tcgen05."""
        if self.platform != "cuda":
            raise ValueError(f"{self.name} is a TPU and has no CUDA architecture")
        return f"sm_{self.generation}" + ("a" if self.generation >= 90 else "")


def _tpu(name, generation, cores, clock, hbm_gib, hbm_gb_per_s, vmem_mib, bf16, fp8=None) -> Chip:
    return Chip(
        name, "tpu", generation, cores, clock * 1e9, int(hbm_gib * GIB), hbm_gb_per_s * 1e9,
        bf16 * 1e12, (fp8 or bf16) * 1e12, vmem_bytes=vmem_mib * MIB,
    )  # fmt: skip


def _gpu(name, capability, cores, clock, hbm_gib, hbm_gb_per_s, smem_kib, bf16, fp8=None) -> Chip:
    return Chip(
        name, "cuda", capability, cores, clock * 1e9, hbm_gib * GIB, hbm_gb_per_s * 1e9,
        bf16 * 1e12, (fp8 or bf16) * 1e12, smem_bytes=smem_kib * KIB,
    )  # fmt: skip


# v5p pairs two cores in one device; hbm_gib is what the compiler leaves to a program.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 5, 1, 1.5, 15.75, 819, 128, 197),
        _tpu("v5p", 5, 2, 1.75, 95.74, 2765, 64, 459),
        _tpu("v6e", 6, 1, 1.75, 31.25, 1638, 128, 918),
        _tpu("v7x", 7, 1, 2.2, 94.75, 3690, 64, 1153.5, 2307),
        _gpu("A100", 80, 108, 1.41, 80, 2039, 163, 312),
        _gpu("H100", 90, 132, 1.98, 80, 3352, 227, 989, 1979),
        _gpu("H200", 90, 132, 1.98, 141, 4800, 227, 989, 1979),
        _gpu("B200", 100, 148, 1.965, 180, 8000, 227, 2250, 4500),
    )
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.platform == "tpu")
GPUS = tuple(name for name, chip in CHIPS.items() if chip.platform == "cuda")
MOSAIC_GPUS = 90, 100  # generations of GPUs that kernels are written for: those with wgmma, and with tcgen05

TPU_KINDS = {
    "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "v7x",
}  # fmt: skip


def chip(name: str) -> Chip:
    """The Chip called `name`; ValueError lists those there are."""
    if name not in CHIPS:
        raise ValueError(f"unknown chip {name!r}; known: {', '.join(CHIPS)}")
    return CHIPS[name]


def find_chip(device_kind: str) -> Chip | None:
    """The Chip that JAX calls `device_kind` (e.g. "TPU v6 lite", "NVIDIA H100 80GB HBM3"), None if it is not listed.

    Boards of one GPU differ a little (an H100 PCIe has fewer cores than the SXM board listed); the architecture agrees.
    """
    if device_kind in TPU_KINDS:
        return CHIPS[TPU_KINDS[device_kind]]
    words = device_kind.replace("-", " ").split()
    return next((CHIPS[name] for name in GPUS if name in words), None)


def chip_of(device) -> Chip:
    """The Chip of a `jax.Device` (anything with a `device_kind`).

    Raises:
      ValueError: no figures are listed for its kind; the message names the kinds that are.
    """
    found = find_chip(device.device_kind)
    if found is None:
        kinds = ", ".join([*TPU_KINDS, *(f"NVIDIA {name}" for name in GPUS)])
        raise ValueError(f"no chip facts for device kind {device.device_kind!r} (known: {kinds}); use the xla kernels")
    return found


def require(chip: Chip, op: str, *, platform: str, generations: tuple[int, ...] = ()) -> None:
    """Raise ValueError unless `chip` is of `platform` and one of `generations` (none given: all of them)."""
    fits = [c for c in CHIPS.values() if c.platform == platform and (not generations or c.generation in generations)]
    if chip.platform != platform or (generations and chip.generation not in generations):
        names = ", ".join(c.name for c in fits)
        raise ValueError(f"{op}: no kernel of this kind for {chip.name}; it runs on {names}; use the xla op elsewhere")
