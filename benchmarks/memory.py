"""The bytes that a forward saves for the backward, with each setting that saves memory.

    python -m benchmarks.memory RESULTS.json     # measures
    python benchmarks/memory.py RESULTS.json     # prints the table of docs/loss.md

The model has SmolLM2 135M's shapes and random weights, which save as much as trained weights.
"""

import json
import sys
from pathlib import Path

# Side -> whether lora_A is frozen, the loss without logits, the layers checkpointed.
SAVINGS = {
    "fastlora": (False, False, False), "lora_A frozen": (True, False, False),
    "loss without logits": (False, True, False), "gradient checkpointing": (False, False, True),
    "all of these": (True, True, True),
}  # fmt: skip


def measured() -> dict[str, float]:
    """Bytes per token of each side: 4 x 256 tokens, bfloat16, rank 16, dropout 0.05."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastlora.estimates import frozen, injected, kept_bytes

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    shapes = LlamaConfig(**sizes, **heads, vocab_size=49152)
    model, fresh = (LlamaForCausalLM(shapes).to(torch.bfloat16).train() for _ in range(2))
    ids = torch.zeros(4, 256, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    config = peft.LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.05)
    found = {"PEFT": kept_bytes(peft.get_peft_model(fresh, config), batch)}
    with frozen(model, batch):
        found["the frozen model"] = kept_bytes(model, batch)
    for name, (freezes_a, loss, checkpointing) in SAVINGS.items():
        with injected(model, config, loss=loss):
            for key, parameter in model.named_parameters():
                parameter.requires_grad_("lora_B" in key or ("lora_A" in key and not freezes_a))
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            found[name] = kept_bytes(model, batch)
            model.gradient_checkpointing_disable()
    return {name: size / ids.numel() for name, size in found.items()}


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
