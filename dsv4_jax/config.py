"""ModelConfig: one frozen object from any published spelling of a DeepSeek-V4 `config.json`.

Everything that differs between Flash, Pro, their Base variants and small test models is data here: the layer
schedule, block sizes, weight formats and the draft module. Code elsewhere reads this object and never a model name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
CSA_RATIO = 4  # the one ratio whose compressor overlaps its windows and has an indexer

WeightFormat = Literal["bf16", "fp8", "fp4"]
ScaleFormat = Literal["e8m0", "f32"]
DraftKind = Literal["none", "mtp", "dspark"]


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the compressed layers' RoPE base; no attention factor (architecture 3.4)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Quantization:
    """Formats of the weights on disk and in memory; activations are a matter of numerics, not of this."""

    block: tuple[int, int] = (128, 128)  # rows x columns of an fp8 weight that share one scale
    expert_format: WeightFormat = "fp4"
    scale_format: ScaleFormat = "e8m0"


@dataclass(frozen=True)
class LayerSpec:
    """What one decoder layer is: its compression ratio (0 = sliding window only) and how it routes."""

    ratio: int
    hashed: bool

    @property
    def kind(self) -> str:
        return SLIDING if self.ratio == 0 else CSA if self.ratio == CSA_RATIO else HCA


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters by their `config.json` names (architecture 1.1). Build with `from_json` or `from_dict`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]  # main layers only
    draft_ratios: tuple[int, ...]  # one entry per MTP layer
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: Yarn | None = None
    max_position_embeddings: int = 1048576
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    draft: DraftKind = "none"
    quantization: Quantization | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(LayerSpec(r, i < self.num_hash_layers) for i, r in enumerate(self.compress_ratios))

    @property
    def mtp_layers(self) -> tuple[LayerSpec, ...]:
        return tuple(LayerSpec(r, hashed=False) for r in self.draft_ratios)

    @property
    def matrix_elements(self) -> int:
        """Weights of the head, of attention's projections and of all experts of the main layers; the rest is small."""
        queries = self.num_attention_heads * self.head_dim
        attention = self.hidden_size * (self.q_lora_rank + self.head_dim + self.o_groups * self.o_lora_rank)
        attention += queries * (self.q_lora_rank + self.o_lora_rank)
        experts = 3 * self.hidden_size * self.moe_intermediate_size * (1 + self.n_routed_experts)
        return self.vocab_size * self.hidden_size + self.num_hidden_layers * (attention + experts)

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read `config.json`. Raises ConfigError naming the file and field."""
        try:
            fields = json.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
        try:
            return cls.from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """From the official or the Hugging Face spelling, or the inference code's short names, to equal objects."""
        if not isinstance(fields, Mapping):
            raise ConfigError(f"config must be a JSON object, not {type(fields).__name__}")
        return _Reader(fields).config()


class ConfigError(ValueError):
    """A config field is missing, unknown, contradictory or not supported; the message names it."""


# Other spellings -> the official one (architecture 1.3).
ALIASES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "rope_head_dim": "qk_rope_head_dim",
    "window_size": "sliding_window",
    "n_hash_layers": "num_hash_layers",
    "moe_inter_dim": "moe_intermediate_size",
    "n_activated_experts": "num_experts_per_tok",
    "route_scale": "routed_scaling_factor",
    "score_func": "scoring_func",
    "norm_eps": "rms_norm_eps",
    "n_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "dtype": "torch_dtype",
}
# Fields that change nothing we compute.
IGNORED = frozenset(
    "architectures attention_dropout auto_map initializer_range torch_dtype transformers_version use_cache "
    "pad_token_id max_batch_size max_seq_len return_dict output_attentions output_hidden_states "
    "chunk_size_feed_forward id2label "
    "label2id is_encoder_decoder problem_type _name_or_path router_aux_loss_coef output_router_logits "
    "router_jitter_noise pretraining_tp".split()
)
# Fields with one implemented value; anything else is refused by name.
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "norm_topk_prob": (True,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "tie_word_embeddings": (False,),
}
REQUIRED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim q_lora_rank o_groups o_lora_rank "
    "sliding_window index_n_heads index_head_dim index_topk n_routed_experts num_experts_per_tok moe_intermediate_size"
).split()
OPTIONAL = (
    "max_position_embeddings routed_scaling_factor swiglu_limit hc_mult hc_sinkhorn_iters hc_eps rms_norm_eps "
    "bos_token_id eos_token_id"
).split()
FLOATS = frozenset(
    "routed_scaling_factor swiglu_limit hc_eps rms_norm_eps rope_theta compress_rope_theta "
    "partial_rotary_factor".split()
)
_MISSING = object()


class _Reader:
    """Takes fields one by one; whatever nobody took is unknown."""

    def __init__(self, fields: Mapping[str, Any]):
        self.left: dict[str, Any] = {}
        for name, value in fields.items():
            official = ALIASES.get(name, name)
            if official in self.left and self.left[official] != value:
                raise ConfigError(f"{name}={value!r} contradicts {official}={self.left[official]!r}")
            self.left[official] = value

    def take(self, name: str, default: Any = _MISSING) -> Any:
        value = self.left.pop(name, None)
        if value is None:
            if default is _MISSING:
                raise ConfigError(f"field {name!r} is missing")
            return default
        return value

    def number(self, name: str, default: Any = _MISSING) -> Any:
        value = self.take(name, default)
        if value is None:
            return None
        kind = float if name in FLOATS else int
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or kind(value) != value:
            raise ConfigError(f"{name}={value!r} must be {'a number' if kind is float else 'an integer'}")
        if value < 0 or (value == 0 and name not in ("bos_token_id", "eos_token_id", "num_hash_layers")):
            raise ConfigError(f"{name}={value!r} must be positive")
        return kind(value)

    def config(self) -> ModelConfig:
        self._check_family()
        values: dict[str, Any] = {name: self.number(name) for name in REQUIRED}
        defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
        values |= {name: self.number(name, defaults[name]) for name in OPTIONAL}
        values["qk_rope_head_dim"] = self._rope_dim(values["head_dim"])
        values |= self._rope()
        values |= self._schedule(values["num_hidden_layers"])
        values["quantization"] = self._quantization()
        for name in [n for n in self.left if n in IGNORED or self.left[n] is None]:
            del self.left[name]
        if self.left:
            raise ConfigError(f"unknown field(s) {sorted(self.left)}; refusing to guess what they change")
        config = ModelConfig(**values)
        _check_consistent(config)
        return config

    def _check_family(self) -> None:
        if str(self.left.get("model_type")) == "deepseek_v41":
            raise ConfigError(
                "model_type 'deepseek_v41' is another architecture (encoder/decoder split, n-gram tables, vision); "
                "this package implements DeepSeek-V4 Flash and Pro only"
            )
        for name, allowed in FIXED.items():
            value = self.take(name, allowed[0])
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not supported; expected {allowed[0]!r}")

    def _rope_dim(self, head_dim: int) -> int:
        explicit, factor = self.number("qk_rope_head_dim", None), self.number("partial_rotary_factor", None)
        implied = None if factor is None else round(factor * head_dim)
        if explicit is None and implied is None:
            raise ConfigError("field 'qk_rope_head_dim' is missing")
        if explicit is not None and implied is not None and explicit != implied:
            raise ConfigError(f"qk_rope_head_dim={explicit} contradicts partial_rotary_factor={factor} x {head_dim}")
        return explicit if explicit is not None else int(implied or 0)

    def _rope(self) -> dict[str, Any]:
        main = self.number("rope_theta", None)
        compress = self.number("compress_rope_theta", None)
        scaling = self.left.pop("rope_scaling", None)
        if "rope_factor" in self.left:  # inference/config.json keeps YaRN flat
            flat = {"original_seq_len": "original_max_position_embeddings", "rope_factor": "factor"}
            scaling = {flat.get(k, k): self.left.pop(k) for k in (*flat, "beta_fast", "beta_slow") if k in self.left}
        parameters = self.left.pop("rope_parameters", None)
        if parameters is not None:
            parameters = _mapping("rope_parameters", parameters)
            nested = parameters if "main" in parameters else {"main": {}, "compress": parameters}
            nested_main = _mapping("rope_parameters.main", nested["main"])
            nested_compress = _mapping("rope_parameters.compress", nested.get("compress", {}))
            kind = nested_main.get("rope_type", "default")
            if kind != "default":
                raise ConfigError(f"rope_parameters.main.rope_type={kind!r} is not supported; expected 'default'")
            main = _agree("rope_theta", main, nested_main.get("rope_theta"))
            compress = _agree("compress_rope_theta", compress, nested_compress.pop("rope_theta", None))
            if scaling is None and nested_compress.get("rope_type", nested_compress.get("type")) == "yarn":
                scaling = nested_compress
        return {
            "rope_theta": float(ModelConfig.rope_theta if main is None else main),
            "compress_rope_theta": float(ModelConfig.compress_rope_theta if compress is None else compress),
            "rope_scaling": None if scaling is None else _yarn(scaling),
        }

    def _schedule(self, layers: int) -> dict[str, Any]:
        mtp = self.left.pop("num_nextn_predict_layers", None) or 0
        if not isinstance(mtp, int) or mtp < 0:
            raise ConfigError(f"num_nextn_predict_layers={mtp!r} must be a non-negative integer")
        dspark = [name for name in self.left if name.startswith("dspark_")]
        for name in dspark:
            del self.left[name]
        ratios = self._ratios(layers)
        if any(not isinstance(r, int) or r < 0 or r == 1 for r in ratios):
            raise ConfigError(f"compress_ratios={ratios} must hold 0 (sliding), 4 (CSA) or larger (HCA)")
        draft: DraftKind = "dspark" if dspark else "mtp" if mtp else "none"
        trailing = tuple(ratios[layers:])
        if draft == "mtp" and trailing and len(trailing) != mtp:
            raise ConfigError(
                f"compress_ratios has {len(trailing)} entries after the {layers} layers, "
                f"but num_nextn_predict_layers={mtp}"
            )
        return {
            "compress_ratios": tuple(ratios[:layers]),
            "draft_ratios": (trailing[:mtp] or (0,) * mtp) if draft == "mtp" else (),
            "num_hash_layers": self._hash_layers(layers),
            "draft": draft,
        }

    def _ratios(self, layers: int) -> list[int]:
        ratios = self.left.pop("compress_ratios", None)
        kinds, rates = self.left.pop("layer_types", None), self.left.pop("compress_rates", None)
        rates = {} if rates is None else _mapping("compress_rates", rates)
        for kind, name in ((CSA, "compress_rate_csa"), (HCA, "compress_rate_hca")):
            if name in self.left:
                rates[kind] = self.left.pop(name)
        if set(rates) - {SLIDING, CSA, HCA}:
            raise ConfigError(f"compress_rates has unknown kinds {sorted(set(rates) - {SLIDING, CSA, HCA})}")
        if kinds is not None:
            if not isinstance(kinds, list | tuple):
                raise ConfigError(f"layer_types={kinds!r} must be a list, one entry per layer")
            rates = {SLIDING: 0, CSA: CSA_RATIO, HCA: 128} | rates
            unknown = sorted(set(kinds) - set(rates))
            if unknown:
                raise ConfigError(f"layer_types has unknown kinds {unknown}; expected {sorted(rates)}")
            implied = [rates[kind] for kind in kinds]
            if rates[CSA] != CSA_RATIO:
                raise ConfigError(f"compress_rates: CSA rate {rates[CSA]} is not supported; expected {CSA_RATIO}")
            if ratios is not None and list(ratios[:layers]) != implied[:layers]:
                raise ConfigError("layer_types contradicts compress_ratios")
            ratios = implied if ratios is None else ratios
        if ratios is None:
            raise ConfigError("field 'compress_ratios' (or 'layer_types') is missing; there is no safe default")
        if not isinstance(ratios, list | tuple):
            raise ConfigError(f"compress_ratios={ratios!r} must be a list, one entry per layer")
        for ratio in ratios if kinds is None else ():
            kind = LayerSpec(ratio, hashed=False).kind
            if rates.get(kind, ratio) != ratio:
                raise ConfigError(f"compress_rates: {kind} rate {rates[kind]} contradicts {ratio} in compress_ratios")
        if len(ratios) < layers:
            raise ConfigError(f"compress_ratios has {len(ratios)} entries for num_hidden_layers={layers}")
        return list(ratios)

    def _hash_layers(self, layers: int) -> int:
        count, kinds = self.left.pop("num_hash_layers", None), self.left.pop("mlp_layer_types", None)
        if kinds is not None:
            if not isinstance(kinds, list | tuple) or len(kinds) != layers:
                raise ConfigError(f"mlp_layer_types={kinds!r} must be a list of {layers}, one entry per layer")
            implied = sum(kind == "hash_moe" for kind in kinds)
            if list(kinds) != ["hash_moe"] * implied + ["moe"] * (len(kinds) - implied):
                raise ConfigError("mlp_layer_types must be hash_moe layers followed by moe layers")
            count = _agree("num_hash_layers", count, implied)
        if not isinstance(count, int) or not 0 <= count <= layers:
            raise ConfigError(f"num_hash_layers={count!r} must be an integer between 0 and {layers}")
        return count

    def _quantization(self) -> Quantization | None:
        spec, experts = self.left.pop("quantization_config", None), self.left.pop("expert_dtype", None)
        if spec is None:
            if experts not in (None, "bf16", "bfloat16"):
                raise ConfigError(f"expert_dtype={experts!r} needs a quantization_config")
            return None
        if not isinstance(spec, Mapping):
            raise ConfigError(f"quantization_config={spec!r} must be a JSON object")
        spec = dict(spec)
        experts = _agree("expert_dtype", experts, spec.pop("expert_dtype", None)) or "fp4"
        if experts not in ("fp4", "fp8"):
            raise ConfigError(f"expert_dtype={experts!r} is not supported; expected 'fp4' or 'fp8'")
        expected = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
        for name, value in expected.items():
            if spec.pop(name, value) != value:
                raise ConfigError(f"quantization_config.{name} must be {value!r}")
        block = spec.pop("weight_block_size", (128, 128))
        spec.pop("modules_to_not_convert", None)
        if spec:
            raise ConfigError(f"unknown quantization_config field(s) {sorted(spec)}")
        is_pair = isinstance(block, list | tuple) and len(block) == 2
        if not is_pair or not all(isinstance(b, int) and b > 0 for b in block):
            raise ConfigError(f"quantization_config.weight_block_size={block!r} must be two positive integers")
        form: WeightFormat = "fp4" if experts == "fp4" else "fp8"
        return Quantization((block[0], block[1]), form, "e8m0" if form == "fp4" else "f32")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}={value!r} must be a JSON object")
    return dict(value)


def _agree(name: str, one: Any, other: Any) -> Any:
    if one is not None and other is not None and one != other:
        raise ConfigError(f"{name} is given twice with different values: {one!r} and {other!r}")
    return other if one is None else one


def _yarn(scaling: Mapping[str, Any]) -> Yarn | None:
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"rope_scaling={scaling!r} must be a JSON object")
    scaling = dict(scaling)
    kind = scaling.pop("rope_type", scaling.pop("type", "yarn"))
    scaling.pop("type", None)
    scaling.pop("partial_rotary_factor", None)
    if kind == "default":
        return None
    if kind != "yarn" or scaling.pop("attention_factor", 1.0) != 1.0:
        raise ConfigError(f"rope_scaling {kind!r} is not supported; expected 'yarn' with attention_factor 1.0")
    known = {f.name for f in dataclasses.fields(Yarn)}
    unknown, missing = (
        sorted(set(scaling) - known),
        sorted({"factor", "original_max_position_embeddings"} - set(scaling)),
    )
    if unknown or missing:
        raise ConfigError(f"rope_scaling: unknown fields {unknown}, missing fields {missing}")
    for name, value in scaling.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"rope_scaling.{name}={value!r} must be a positive number")
    return Yarn(
        factor=float(scaling["factor"]),
        original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        beta_fast=float(scaling.get("beta_fast", Yarn.beta_fast)),
        beta_slow=float(scaling.get("beta_slow", Yarn.beta_slow)),
    )


def _check_consistent(c: ModelConfig) -> None:
    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    require(c.num_attention_heads % c.o_groups == 0, f"{c.o_groups=} does not divide {c.num_attention_heads=}")
    require(c.num_experts_per_tok <= c.n_routed_experts, f"{c.num_experts_per_tok=} exceeds {c.n_routed_experts=}")
    for name in ("head_dim", "index_head_dim"):
        require(getattr(c, name) >= c.qk_rope_head_dim, f"qk_rope_head_dim={c.qk_rope_head_dim} exceeds {name}")
    require(c.qk_rope_head_dim % 2 == 0, f"{c.qk_rope_head_dim=} must be even")
    require(all(r == 0 for r in c.draft_ratios), f"MTP layers must be sliding (ratio 0), got {c.draft_ratios}")
