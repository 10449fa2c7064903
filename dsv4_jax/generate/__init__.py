"""Text out of a model: `generate` in one compiled call, `stream` step by step, `logits` for scoring."""

from dsv4_jax.generate.api import Generation, Stats, StreamEvent, generate, logits, stream
from dsv4_jax.generate.sampling import Greedy, Sample, Sampler

__all__ = ["Generation", "Greedy", "Sample", "Sampler", "Stats", "StreamEvent", "generate", "logits", "stream"]
