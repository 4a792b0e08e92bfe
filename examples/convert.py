"""Convert a GGUF file to a folder that transformers loads without gguf."""

from functools import cache
from types import SimpleNamespace

import gguf
import torch
from quantized import gguf_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(run: SimpleNamespace) -> None:
    """Write one part to ``run.folder``: the model in bfloat16, or its tokenizer (``run.part``).

    The GGUF file is in the folder ``run.packed``.  Both parts take about equally long.
    """
    gguf.GGUFReader = cache(gguf.GGUFReader)  # read once, not for config and weights: 10 s each
    name = gguf_of(run.packed).name
    if run.part == "tokenizer":
        part = AutoTokenizer.from_pretrained(run.packed, gguf_file=name)
    else:
        config = GgufConfig(dequantize=True)
        part = AutoModelForCausalLM.from_pretrained(
            run.packed, gguf_file=name, quantization_config=config, dtype=torch.bfloat16
        )
    part.save_pretrained(run.folder)
