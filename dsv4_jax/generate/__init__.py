"""Text out of a model: `generate` in one call, `stream` step by step, `logits` for scoring; and programs to ship."""

from dsv4_jax.generate.api import Generation, Stats, StreamEvent, generate, logits, stream
from dsv4_jax.generate.program import Program, compile_program, load_program
from dsv4_jax.generate.sampling import Greedy, Sample, Sampler

__all__ = [
    "Generation",
    "Greedy",
    "Program",
    "Sample",
    "Sampler",
    "Stats",
    "StreamEvent",
    "compile_program",
    "generate",
    "load_program",
    "logits",
    "stream",
]
