"""Sample from an adapter that sft.py or grpo.py saved, and export it for llama.cpp.

    pip install -e '.[recipes,gguf]'  # in a clone
    python examples/sample.py --adapter out/sft --prompt "Why is the sky blue?"
    python examples/sample.py --adapter out/sft --gguf sft.gguf

It samples with merged weights, at the base model's speed.  llama.cpp loads the exported file with
``llama-cli -m BASE.gguf --lora sft.gguf``.
"""

from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fastlora


def main() -> None:
    options = parse_options()
    base = peft.PeftConfig.from_pretrained(options.adapter).base_model_name_or_path
    if options.prompt:
        print(sampled(options, base))
    if options.gguf:
        config = AutoConfig.from_pretrained(base)
        fastlora.export_gguf(options.adapter, options.gguf, model_config=config)
        size = Path(options.gguf).stat().st_size / 2**20
        print(f"{options.gguf}: the adapter, {size:.1f} MiB; llama.cpp loads it beside {base}")


@torch.no_grad()
def sampled(options: Namespace, base: str) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.adapter)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").to(device)
    model = peft.PeftModel.from_pretrained(model, options.adapter).eval()
    text = options.prompt
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    special = not tokenizer.chat_template  # a template writes the special tokens itself
    inputs = tokenizer(text, add_special_tokens=special, return_tensors="pt").to(device)
    with fastlora.merged(model):
        tokens = model.generate(**inputs, max_new_tokens=options.tokens)[0]
    return tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def parse_options() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", required=True, help="a folder with PEFT's files")
    parser.add_argument("--prompt", help="the user's message")
    parser.add_argument("--tokens", type=int, default=200, help="largest number of new tokens")
    parser.add_argument("--gguf", help="export the adapter to this file")
    options = parser.parse_args()
    if not (options.prompt or options.gguf):
        parser.error("nothing to do: give --prompt TEXT, --gguf FILE, or both")
    if options.gguf and not find_spec("gguf"):
        parser.error("--gguf needs the package gguf: pip install gguf")
    return options


if __name__ == "__main__":
    main()
