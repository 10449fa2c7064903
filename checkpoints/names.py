"""The one table between official tensor names and the model's parameters.

A line: official name, our path, how it is stored, and, for stacked parameters, where in the stack it goes. DeepSeek's
names stand here and nowhere else; everything else (shapes, which layers have what) follows from the model itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from checkpoints.errors import CheckpointError
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import DeepseekV4
from dsv4_jax.rope import Constant
from dsv4_jax.sharding import leaf_path

# How a tensor is stored officially. QUANT: `.weight` with, where quantised, a `.scale` beside it.
BF16, F32, I64, QUANT = "BF16", "F32", "I64", "QUANT"
EXPERT = "expert"  # in an index: the number that {e} stands for


@dataclass(frozen=True)
class Line:
    official: str
    path: str
    stored: str
    index: tuple[int | str, ...] = ()


LAYER = (
    Line("attn_norm.weight", "input_layernorm.weight", BF16),
    Line("ffn_norm.weight", "post_attention_layernorm.weight", BF16),
    Line("hc_attn_fn", "attn_hc.fn", F32),
    Line("hc_attn_base", "attn_hc.base", F32),
    Line("hc_attn_scale", "attn_hc.scale", F32),
    Line("hc_ffn_fn", "ffn_hc.fn", F32),
    Line("hc_ffn_base", "ffn_hc.base", F32),
    Line("hc_ffn_scale", "ffn_hc.scale", F32),
    Line("attn.wq_a", "self_attn.q_a_proj", QUANT),
    Line("attn.q_norm.weight", "self_attn.q_a_norm.weight", BF16),
    Line("attn.wq_b", "self_attn.q_b_proj", QUANT),
    Line("attn.wkv", "self_attn.kv_proj", QUANT),
    Line("attn.kv_norm.weight", "self_attn.kv_norm.weight", BF16),
    Line("attn.attn_sink", "self_attn.sinks", F32),
    Line("attn.wo_a", "self_attn.o_a_proj", QUANT),
    Line("attn.wo_b", "self_attn.o_b_proj", QUANT),
    Line("attn.compressor.wkv.weight", "self_attn.compressor.kv_proj", BF16),
    Line("attn.compressor.wgate.weight", "self_attn.compressor.gate_proj", BF16),
    Line("attn.compressor.ape", "self_attn.compressor.position_bias", F32),
    Line("attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight", BF16),
    Line("attn.indexer.wq_b", "self_attn.indexer.q_b_proj", QUANT),
    Line("attn.indexer.weights_proj.weight", "self_attn.indexer.weights_proj", BF16),
    Line("attn.indexer.compressor.wkv.weight", "self_attn.indexer.compressor.kv_proj", BF16),
    Line("attn.indexer.compressor.wgate.weight", "self_attn.indexer.compressor.gate_proj", BF16),
    Line("attn.indexer.compressor.ape", "self_attn.indexer.compressor.position_bias", F32),
    Line("attn.indexer.compressor.norm.weight", "self_attn.indexer.compressor.kv_norm.weight", BF16),
    Line("ffn.gate.weight", "mlp.gate.weight", BF16),
    Line("ffn.gate.bias", "mlp.gate.e_score_correction_bias", F32),
    Line("ffn.gate.tid2eid", "mlp.gate.tid2eid", I64),
    Line("ffn.experts.{e}.w1", "mlp.experts.gate_up_proj", QUANT, (EXPERT, 0)),
    Line("ffn.experts.{e}.w3", "mlp.experts.gate_up_proj", QUANT, (EXPERT, 1)),
    Line("ffn.experts.{e}.w2", "mlp.experts.down_proj", QUANT, (EXPERT,)),
    Line("ffn.shared_experts.w1", "mlp.shared_experts.gate_up_proj", QUANT, (0,)),
    Line("ffn.shared_experts.w3", "mlp.shared_experts.gate_up_proj", QUANT, (1,)),
    Line("ffn.shared_experts.w2", "mlp.shared_experts.down_proj", QUANT),
)
HEAD = (
    Line("norm.weight", "norm.weight", BF16),
    Line("hc_head_fn", "hc_head.fn", F32),
    Line("hc_head_base", "hc_head.base", F32),
    Line("hc_head_scale", "hc_head.scale", F32),
)
MTP = (
    Line("e_proj", "e_proj", QUANT),
    Line("h_proj", "h_proj", QUANT),
    Line("enorm.weight", "enorm.weight", BF16),
    Line("hnorm.weight", "hnorm.weight", BF16),
)
TABLE = (
    Line("embed.weight", "embed_tokens", BF16),
    Line("head.weight", "lm_head", BF16),
    *HEAD,
    *(Line(f"layers.{{n}}.{x.official}", f"layers.{{n}}.{x.path}", x.stored, x.index) for x in LAYER),
    *(Line(f"mtp.{{n}}.{x.official}", f"mtp.{{n}}.{x.path}", x.stored, x.index) for x in (*HEAD, *MTP)),
    *(Line(f"mtp.{{n}}.{x.official}", f"mtp.{{n}}.block.{x.path}", x.stored, x.index) for x in LAYER),
)

# Stored form of an official dtype: the same bytes, in a dtype that JAX and array stores know. I64 is narrowed.
STORED = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "I64": np.dtype(np.int32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(np.uint8),
    "I8": np.dtype(np.uint8),
    "U8": np.dtype(np.uint8),
}
CARRIED = "carried."  # before the names of tensors that are kept for export alone, as raw bytes
# Largest block scale: codes reach 448 < 2^9, and float32 ends at 2^128.
MOST_SCALE, MOST_SCALE_CODE = 2.0**119, 246


@dataclass(frozen=True)
class Piece:
    """One official tensor and its place in a leaf: `leaf[index]`."""

    name: str
    index: tuple[int, ...]


@dataclass(frozen=True)
class Leaf:
    """One array of the model (a parameter, or the data or scale of a quantised one) and what it is made of."""

    path: str
    shape: tuple[int, ...]
    official: str  # official dtype of every piece
    pieces: tuple[Piece, ...]

    @property
    def stored(self) -> np.dtype:
        return STORED[self.official]

    @property
    def piece_shape(self) -> tuple[int, ...]:
        return self.shape[len(self.pieces[0].index) :]

    @property
    def is_block_scale(self) -> bool:
        return self.official in ("F8_E8M0", "F32") and self.pieces[0].name.endswith(".scale")

    @functools.cached_property
    def names(self) -> dict[tuple[int, ...], str]:
        """Index -> official name."""
        return {piece.index: piece.name for piece in self.pieces}


def carried_leaf(name: str, dtype: np.dtype, shape: Sequence[int]) -> Leaf:
    """A tensor kept as the bytes it is made of, its last axis in bytes."""
    *outer, last = shape or (1,)
    return Leaf(CARRIED + name, (*outer, last * dtype.itemsize), "U8", (Piece(name, ()),))


def abstract_model(config: ModelConfig) -> DeepseekV4:
    """The model's shapes, in the formats a checkpoint stores; nothing is allocated."""
    return jax.eval_shape(lambda: DeepseekV4(config, max_tokens=1, dtype=ml_dtypes.bfloat16))


def model_leaves(model: DeepseekV4) -> dict[str, jax.ShapeDtypeStruct | jax.Array]:
    """Path -> array of everything a checkpoint holds: parameters and buffers, no constants."""
    keyed = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Not(Constant)))[0]
    return {leaf_path(keys): array for keys, array in keyed}


def leaf_table(model: DeepseekV4) -> dict[str, Leaf]:
    """Every leaf of an (abstract) model with the official tensors it is assembled from, in the table's order."""
    arrays = model_leaves(model)
    table: dict[str, Leaf] = {}
    for path, field, line, n in _matches(arrays):
        array = arrays[path]
        experts = array.shape[0] if EXPERT in line.index else 1
        table_pieces = table[path].pieces if path in table else ()
        fresh = tuple(
            Piece(_official_name(line, field, n, e), tuple(e if i == EXPERT else int(i) for i in line.index))
            for e in range(experts)
        )
        table[path] = Leaf(path, tuple(array.shape), _official_dtype(line, field, array), table_pieces + fresh)
    missing = sorted(set(arrays) - set(table))
    if missing:
        raise CheckpointError(f"the name table has no line for parameter(s) {missing[:5]}")
    return table


def _matches(arrays) -> Iterator[tuple[str, str, Line, int | None]]:
    """Each (leaf path, field, table line, layer number) for which the model has a parameter."""
    numbers: dict[str, list[int | None]] = {"": [None]}
    for prefix in ("layers", "mtp"):
        found = {int(path.split(".")[1]) for path in arrays if path.startswith(prefix + ".")}
        numbers[prefix] = list(sorted(found))
    for line in TABLE:
        prefix = line.path.split(".")[0] if "{n}" in line.path else ""
        for n in numbers[prefix]:
            base = line.path.format(n=n)
            for field in ("", ".data", ".scale"):
                if base + field in arrays:
                    yield base + field, field, line, n


def _official_name(line: Line, field: str, n: int | None, e: int) -> str:
    suffix = "" if line.stored != QUANT else ".scale" if field == ".scale" else ".weight"
    return line.official.format(n=n, e=e) + suffix


def _official_dtype(line: Line, field: str, array) -> str:
    if line.stored != QUANT:
        return line.stored
    if field == ".scale":
        return "F8_E8M0" if array.dtype == np.uint8 else "F32"
    if field == ".data":
        return "I8" if array.dtype == np.uint8 else "F8_E4M3"
    return BF16
