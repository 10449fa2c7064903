"""DeepSeek-V4 in JAX: the model, and text out of it. Checkpoints are loaded by the package `checkpoints`."""

from dsv4_jax.config import ConfigError, ModelConfig
from dsv4_jax.generate import (
    Generation,
    Greedy,
    Program,
    Sample,
    Sampler,
    Stats,
    StreamEvent,
    compile_program,
    generate,
    load_program,
    logits,
    stream,
)
from dsv4_jax.model import DeepseekV4

__all__ = [
    "ConfigError",
    "DeepseekV4",
    "Generation",
    "Greedy",
    "ModelConfig",
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
