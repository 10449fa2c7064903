"""XLA flags of tests: their machine code runs a few times and is compiled once, so the compiler may hurry."""

from importlib.metadata import version

from packaging.version import Version


def hurried_flags() -> str:
    flags = ["--xla_backend_optimization_level=0"]
    if Version(version("jaxlib")) < Version("0.11"):  # later ones have no other emitters, and refuse the flag
        flags.append("--xla_cpu_use_fusion_emitters=false")  # three quarters of the time
    return " ".join(flags)
