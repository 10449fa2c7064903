"""DeepseekV4: embedding to streams, decoder layers, head collapse, LM head (architecture 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsv4_jax.cache import Cache, CacheFormat, LayerCache, Step, init_cache, init_layer_cache
from dsv4_jax.compressor import entry_index
from dsv4_jax.config import ModelConfig
from dsv4_jax.hyper_connection import HyperHead
from dsv4_jax.kernels import Kernels, resolve_kernels
from dsv4_jax.layer import DecoderLayer, run_layer
from dsv4_jax.linear import RMSNorm
from dsv4_jax.mtp import MtpLayer
from dsv4_jax.numerics import Numerics, resolve_numerics
from dsv4_jax.repeat import NO_RUN, kind_of, longest_run, loop
from dsv4_jax.rope import RopeTable, Rotations, rope_specs
from dsv4_jax.schedule import AsyncSchedule
from dsv4_jax.sharding import SINGLE, Parallel


class DeepseekV4(nnx.Module):
    """The whole model. It owns the two RoPE tables and hands each layer what it rotates with.

    Args:
      config: hyper-parameters.
      max_tokens: length of the longest sequence, prompt and continuation; bounds the RoPE tables and the cache.
      dtype: of activations, and of weights that the checkpoint stores unquantised.
      kernels: the platform strategy, or its name.
      numerics: which activations are rounded, or its name; "auto" is as the checkpoint was trained.
      cache_dtype: of KV rows and index keys; default `dtype`. "fp8" holds KV rows in 584 bytes (at the published sizes)
        and index keys in 4 bits where the numerics round them so, in 8 otherwise.
      schedule: the one that all layers share; default three lanes, streams where the strategy has them.
      parallel: the mesh; parameters have their whole shapes, and calls belong inside `parallel.shard`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_tokens: int,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        kernels: str | Kernels = "auto",
        numerics: str | Numerics = "auto",
        cache_dtype: jax.typing.DTypeLike | None = None,
        schedule: AsyncSchedule | None = None,
        parallel: Parallel = SINGLE,
    ):
        if isinstance(kernels, str):
            alone = parallel.mesh is None
            kernels = resolve_kernels(kernels, weight_bytes=alone * config.matrix_elements * jnp.dtype(dtype).itemsize)
        if kernels.one_device and parallel.mesh is not None:
            raise ValueError(f"kernels={kernels.name!r} runs on one device, not over a mesh; choose 'auto' or 'xla'")
        numerics = (resolve_numerics(numerics, config) if isinstance(numerics, str) else numerics).on(kernels)
        dtype = jnp.dtype(dtype)
        self.config, self.max_tokens, self.dtype = config, max_tokens, dtype
        schedule = AsyncSchedule(streams=kernels.has_streams) if schedule is None else schedule
        self.kernels, self.numerics, self.schedule, self.parallel = kernels, numerics, schedule, parallel
        held = "fp8" if cache_dtype in ("fp8", jnp.float8_e4m3fn) else jnp.dtype(cache_dtype or dtype)
        self.cache_format = CacheFormat(held, numerics.index_format)
        self.embed_tokens = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))
        shared = (kernels, numerics, dtype, schedule, parallel)
        self.layers = nnx.List([DecoderLayer(config, spec, *shared) for spec in config.layers])
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.lm_head = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), dtype))
        self.mtp = nnx.List([MtpLayer(config, spec, *shared) for spec in config.mtp_layers])
        main, compress = rope_specs(config)
        self.rope_main, self.rope_compress = RopeTable(main, max_tokens), RopeTable(compress, max_tokens)

    def init_cache(self, batch: int, max_tokens: int | None = None, *, drafts: int = 0) -> Cache:
        """An empty cache for `batch` sequences of up to `max_tokens` (default: the model's)."""
        return init_cache(self.config, batch, max_tokens or self.max_tokens, self.cache_format, drafts=drafts)

    def init_mtp_cache(self, batch: int, *, drafts: int = 0) -> tuple[LayerCache, ...]:
        """An empty cache per MTP layer; sliding layers need no capacity beyond their window."""
        form = self.cache_format
        make = lambda spec: init_layer_cache(self.config, spec, batch, self.max_tokens, form, drafts=drafts)
        return tuple(make(spec) for spec in self.config.mtp_layers)

    def __call__(
        self, tokens: jax.Array, cache: Cache, count: jax.Array, *, in_loop: bool = False
    ) -> tuple[jax.Array, Cache]:
        """Continue each sequence by the first `count` of its T tokens.

        Args:
          tokens: int32 [B, T]; what follows the first `count` of a row is padding.
          cache: as returned by the last call, or by `init_cache`.
          count: int32 [B] in 0 .. T.
          in_loop: compile layers of a kind once; for many tokens, and not for gradients. See `repeat.py`.
        Returns:
          streams [B, T, N, M] after the last layer (for `head`, and for MTP), and the cache with length + count.
        """
        step = Step(tokens, cache.length, count)
        streams = jnp.repeat(self.embed(tokens)[:, :, None], self.config.hc_mult, axis=2)
        states = list(cache.layers)
        rotations = {ratio: self.rotations(ratio, step) for ratio in dict.fromkeys(self.config.compress_ratios)}
        apply = lambda spec, layer, streams, state: run_layer(layer, streams, rotations[spec.ratio], state, step)
        specs, layers = self.config.layers, list(self.layers)
        run = longest_run([kind_of(pair) for pair in zip(layers, states, strict=True)]) if in_loop else NO_RUN
        for i in range(len(layers)):
            if i == run.first and run.turns:
                place = lambda j, *args: apply(specs[run.first + j], *args)
                streams, states[run.first : run.end] = loop(run, layers, states, streams, place)
            elif not run.first <= i < run.end:
                streams, states[i] = apply(specs[i], layers[i], streams, states[i])
        return streams, Cache(tuple(states), step.end)

    def rotations(self, ratio: int, step: Step) -> Rotations:
        """What layers that compress by `ratio` rotate with in a step: read from the tables once for all of them."""
        if not ratio:
            return Rotations(self.rope_main(step.positions))
        entries = self.rope_compress(entry_index(step, ratio) * ratio)
        # Barred from moving: a table that goes into a branch is copied there, on TPU.
        return Rotations(self.rope_compress(step.positions), jax.lax.optimization_barrier(entries))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, M]."""
        table = self.embed_tokens[...]
        if self.parallel.model == 1:
            return table[tokens]
        index = tokens - self.parallel.model_index() * table.shape[0]
        here = (index >= 0) & (index < table.shape[0])
        return self.parallel.sum_model(jnp.where(here[..., None], table.at[index].get(mode="clip"), 0))

    def head(self, streams: jax.Array) -> jax.Array:
        """Streams [B, T, N, M] -> fp32 logits [B, T, V]."""
        return self._logits(self.norm(self.hc_head(streams)))

    def draft(self, index: int, streams, tokens, cache: LayerCache, start, count) -> tuple[jax.Array, LayerCache]:
        """MTP layer `index` over streams [B, T, N, M] at positions start .. and the tokens [B, T] that follow each."""
        step = Step(tokens, start, count)
        rotations = self.rotations(self.config.draft_ratios[index], step)
        return self.mtp[index](streams, self.embed(tokens), rotations, cache, step)

    def draft_head(self, index: int, streams: jax.Array) -> jax.Array:
        """An MTP layer's streams -> fp32 logits [B, T, V], by its own collapse and norm and the shared LM head."""
        layer = self.mtp[index]
        return self._logits(layer.norm(layer.hc_head(streams)))

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.parallel.gather_model(self.kernels.matmul_each(x, self.lm_head[...])[0])
