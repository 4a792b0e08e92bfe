"""Turn a GGUF file into what transformers loads without it."""

from functools import cache
from types import SimpleNamespace

import gguf
import torch
from quantized import gguf_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(run: SimpleNamespace) -> None:
    """Write the model, in bfloat16, or its tokenizer to ``run.folder``: what ``run.part`` says.

    Each takes about as long as the other.  The file is the one in ``run.packed``.
    """
    gguf.GGUFReader = cache(gguf.GGUFReader)  # for the config and for the weights: 10 s each
    name = gguf_of(run.packed).name
    if run.part == "tokenizer":
        part = AutoTokenizer.from_pretrained(run.packed, gguf_file=name)
    else:
        config = GgufConfig(dequantize=True)
        part = AutoModelForCausalLM.from_pretrained(
            run.packed, gguf_file=name, quantization_config=config, dtype=torch.bfloat16
        )
    part.save_pretrained(run.folder)
