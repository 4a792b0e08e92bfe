"""Make a small Qwen3-MoE, a mixture of experts, with random weights.  Its tokens are bytes."""

from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
}  # fmt: skip


def main(run: SimpleNamespace) -> None:
    print(f"making a mixture of {SIZES['num_experts']} experts with random weights", flush=True)
    make(Path(run.folder), run.seed, SIZES)


def make(folder: Path, seed: int, sizes: dict[str, int]) -> None:
    """Write a float32 model of these sizes and its tokenizer to a folder."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, **sizes
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
