"""The bytes that a forward saves for the backward, with each setting that saves memory.

    python -m benchmarks.memory RESULTS.json     # measures
    python benchmarks/memory.py RESULTS.json     # prints the table of docs/memory.md

The model has SmolLM2 135M's shapes and random weights, which save as much as trained weights.
"""

import json
import sys
from pathlib import Path


def measured() -> dict[str, float]:
    """Bytes per token of each side: 4 x 256 tokens, bfloat16, rank 16, dropout 0.05."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import fastlora
    from fastlora.estimates import kept_bytes

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes, **heads, vocab_size=49152)
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    ids = torch.zeros(4, 256, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    settings = {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.05}
    config = fastlora.LoRAConfig(**settings)
    found = fastlora.estimate(model, [16], config=config, batch=batch, rounds=1)
    (cost,) = found.rank_costs
    theirs = kept_bytes(peft.get_peft_model(model, peft.LoraConfig(**settings)), batch)
    sides = {"PEFT": theirs / ids.numel(), "the frozen model": found.frozen.kept_bytes}
    return sides | {"fastlora": cost.kept_bytes} | cost.kept_with


def main() -> None:
    file = Path(sys.argv[1])
    if __package__:
        file.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
    sides = json.loads(file.read_text())
    lines = [("", "KiB a token"), *((name, f"{size / 1024:.0f}") for name, size in sides.items())]
    print(pipes(lines))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    from report import pipes

    main()
