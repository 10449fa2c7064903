"""Times transformers' DeepSeek-V4 on CPU in float32. Run as a child, so that torch and jax never share a process:

python -m benchmarks.peer_transformers CHECKPOINT --prompt-tokens 1024 --new-tokens 32 --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import DeepseekV4Config

from benchmarks import random_prompt

LAYER_TYPES = {0: "sliding_attention", 4: "compressed_sparse_attention"}  # any other rate is HCA
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # value of each fp4 code
QUANTISATION_FIELDS = ("quantization_config", "expert_dtype")


def peer_config(checkpoint: Path) -> DeepseekV4Config:
    """transformers' config of an official `config.json`, with the layer schedule spelled out.

    Its own reading of `compress_ratios` knows the rates 0, 4 and 128 alone.
    Raises ValueError where the schedule has two HCA rates, which transformers cannot express.
    """
    fields = json.loads((checkpoint / "config.json").read_text())
    ratios = fields.pop("compress_ratios")[: fields["num_hidden_layers"]]
    rates = {r for r in ratios if r not in LAYER_TYPES}
    if len(rates) > 1:
        raise ValueError(f"{checkpoint}: HCA rates {sorted(rates)}; transformers takes one rate for all HCA layers")
    fields["layer_types"] = [LAYER_TYPES.get(r, "heavily_compressed_attention") for r in ratios]
    fields["compress_rate_hca"] = rates.pop() if rates else 128
    return DeepseekV4Config(**{k: v for k, v in fields.items() if k not in QUANTISATION_FIELDS})


def load_peer(checkpoint: str | Path) -> DeepseekV4ForCausalLM:
    """An official checkpoint as transformers' model: float32, eager attention, eager experts."""
    checkpoint = Path(checkpoint)
    with plain_weights(checkpoint) as directory:
        model = DeepseekV4ForCausalLM.from_pretrained(
            directory,
            config=peer_config(checkpoint),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    return model.eval()


@contextmanager
def plain_weights(checkpoint: Path) -> Iterator[Path]:
    """A directory with the same weights unquantised: the checkpoint itself, or a temporary float32 copy.

    transformers dequantises fp8 by dividing the weight's size by the number of scales, which is wrong where the last
    block is partial; so quantised weights are handed to it as float32.
    """
    fields = json.loads((checkpoint / "config.json").read_text())
    if not fields.get("quantization_config"):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="dsv4-peer-") as directory:
        save_file(dequantised(checkpoint), Path(directory) / "model.safetensors", metadata={"format": "pt"})
        plain = {k: v for k, v in fields.items() if k not in QUANTISATION_FIELDS}
        (Path(directory) / "config.json").write_text(json.dumps(plain))
        yield Path(directory)


def dequantised(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the main model by its official name; quantised ones float32, their scales multiplied in."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            stored |= {name: shard.get_tensor(name) for name in shard.keys() if not name.startswith("mtp.")}
    if not stored:
        raise ValueError(f"{checkpoint}: no *.safetensors files here")
    plain = {name: tensor for name, tensor in stored.items() if not name.endswith(".scale")}
    for name in [n for n in stored if n.endswith(".scale")]:
        weight = name.removesuffix("scale") + "weight"
        plain[weight] = scaled(stored[weight], stored[name])
    return plain


def scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp8 codes [N, K] x scales per 128 x 128, or packed fp4 (int8 [N, K / 2]) x scales per 32, to float32 [N, K]."""
    if weight.dtype == torch.int8:
        codes = weight.view(torch.uint8).long()
        values = torch.stack([E2M1[codes & 15], E2M1[codes >> 4]], dim=-1).flatten(1)  # low nibble = even k
        return values * scale.float().repeat_interleave(32, dim=1)
    rows, columns = weight.shape
    grid = scale.float().repeat_interleave(128, dim=0)[:rows].repeat_interleave(128, dim=1)[:, :columns]
    return weight.float() * grid


@torch.inference_mode()
def run_once(model: DeepseekV4ForCausalLM, prompt: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Prefill [B, T], then greedy steps on the cache: seconds of the prefill and of each step; tokens by row."""
    began = time.perf_counter()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    prefill = time.perf_counter() - began
    tokens, steps = [token], []
    while len(tokens) < new_tokens:
        began = time.perf_counter()
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
        steps.append(time.perf_counter() - began)
    return {"prefill": prefill, "steps": steps, "tokens": torch.cat(tokens, dim=1).tolist()}


def measure(checkpoint: Path, prompt: np.ndarray, new_tokens: int, threads: list[int], repeats: int) -> dict[str, Any]:
    """Medians per thread count, and the best of them; the first run of each count is a warm-up."""
    model = load_peer(checkpoint)
    ids = torch.from_numpy(prompt.astype(np.int64))
    by_threads = []
    for count in threads:
        torch.set_num_threads(count)
        runs = [run_once(model, ids, new_tokens) for _ in range(repeats + 1)][1:]
        by_threads.append(
            {
                "threads": count,
                "prefill_ms": 1e3 * statistics.median(run["prefill"] for run in runs),
                "decode_ms": 1e3 * statistics.median(step for run in runs for step in run["steps"]),
                "tokens": runs[-1]["tokens"],
            }
        )
    best = {what: min(by_threads, key=lambda row: row[what]) for what in ("prefill_ms", "decode_ms")}
    return {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "by_threads": by_threads,
        "prefill_ms": best["prefill_ms"]["prefill_ms"],
        "prefill_threads": best["prefill_ms"]["threads"],
        "decode_ms": best["decode_ms"]["decode_ms"],
        "decode_threads": best["decode_ms"]["threads"],
        "tokens": best["decode_ms"]["tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_transformers", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="directory in the official format")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32, help="at least 2: decode is timed from the second on")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, os.cpu_count() or 1)}))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error("--new-tokens must be at least 2")
    vocab = json.loads((args.checkpoint / "config.json").read_text())["vocab_size"]
    prompt = random_prompt(args.prompt_tokens, vocab, args.batch)
    result = measure(args.checkpoint, prompt, args.new_tokens, args.threads, args.repeats)
    if args.json:
        print(json.dumps(result))
        return
    for row in result["by_threads"]:
        print(f"{row['threads']} thread(s): prefill {row['prefill_ms']:.1f} ms, decode {row['decode_ms']:.2f} ms/token")


if __name__ == "__main__":
    main()
