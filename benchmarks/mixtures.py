"""The memory of LoRA on all experts of well-known mixtures, dense and packed.

    python -m benchmarks.mixtures mixtures.json

Weights and adapters are counted by ``fastlora.estimate`` on meta models of the real sizes.  Bytes
saved for the backward are counted in forwards of one layer and of two, with few experts: each
further layer saves as much as the second.  The scores of attention, which grow with the square of
the tokens, are not counted, because flash attention saves none.
"""

import json
import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, DeepseekV4Config, GptOssConfig, Qwen3MoeConfig

import fastlora

from .blocks import TARGETS
from .report import pipes

TOKENS, RANK, _GIB = 4096, 8, 2**30
# The published packing of each model, or one that fits it; and its config.
MODELS = {
    "gpt-oss-20b": ("mxfp4", GptOssConfig, {"num_hidden_layers": 24, "num_local_experts": 32}),
    "Qwen3-30B-A3B": ("fp8", Qwen3MoeConfig, {
        "vocab_size": 151936, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128,
    }),
    "DeepSeek V4 Flash": ("mxfp4", DeepseekV4Config, {}),
}  # fmt: skip
_LORA = peft.LoraConfig(**TARGETS["experts"])


def cost(config, kind: str = "", tokens: int = 0) -> fastlora.estimates.count.Estimate:
    """Counted on meta; with ``tokens``, also the bytes that a forward of them saves."""
    device, rounds = ("cpu", 1) if tokens else ("meta", 0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if kind:
        fastlora.pack(model, kind)
    batch = {name: torch.zeros(1, tokens, dtype=torch.int64) for name in ("input_ids", "labels")}
    return fastlora.estimate(model, [RANK], config=_LORA, batch=batch, rounds=rounds)


def row(name: str) -> dict:
    kind, make, settings = MODELS[name]
    whole, kept = make(**settings), []
    dense, packed = cost(whole), cost(whole, kind)
    for layers in (1, 2):
        few = {"num_hidden_layers": layers, "vocab_size": 1024}
        few |= {"num_experts": 8, "n_routed_experts": 8, "num_local_experts": 8}
        config = make(**(settings | few))
        half, all_of_it = (cost(config, "", n).rank_costs[0].kept_bytes for n in (128, 256))
        kept.append(2 * half - all_of_it)
    layers = whole.num_hidden_layers
    return {
        "model": name, "packed as": kind, "parameters": dense.frozen.parameters,
        "dense": dense.frozen.bytes, "packed": packed.frozen.bytes,
        "adapters with AdamW": dense.rank_costs[0].training_bytes,
        "kept": TOKENS * (kept[0] + (layers - 1) * (kept[1] - kept[0])),
    }  # fmt: skip


def main() -> None:
    rows = [row(name) for name in MODELS]
    sizes = ("dense", "packed", "adapters with AdamW", "kept")
    lines = [("model", "packed as", *(f"{size}, GiB" for size in sizes))]
    for one in rows:
        lines.append((one["model"], one["packed as"], *(f"{one[s] / _GIB:.1f}" for s in sizes)))
    print(pipes(lines))
    report = {"tokens": TOKENS, "rank": RANK, "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
