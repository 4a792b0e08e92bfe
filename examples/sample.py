"""Sample from an adapter that sft.py or grpo.py made, and write it for llama.cpp.

    pip install 'fastlora-kernels[recipes,gguf]'
    python sample.py --adapter out/sft-Qwen3-0.6B --prompt "Why is the sky blue?"
    python sample.py --adapter out/sft-Qwen3-0.6B --gguf sft.gguf

Sampling is merged, at the base model's speed.  llama.cpp: llama-cli -m BASE.gguf --lora sft.gguf
"""

from argparse import ArgumentParser, Namespace

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
        print(f"{options.gguf}: load it beside {base} as llama.cpp has it")


@torch.no_grad()
def sampled(options: Namespace, base: str) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.adapter)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").to(device)
    model = peft.PeftModel.from_pretrained(model, options.adapter).eval()
    chat = [{"role": "user", "content": options.prompt}]
    how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(chat, **how).to(device)
    with fastlora.merged(model):
        tokens = model.generate(**inputs, max_new_tokens=options.tokens)[0]
    return tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def parse_options() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", required=True, help="a folder with PEFT's files")
    parser.add_argument("--prompt", help="what the user says")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many are sampled")
    parser.add_argument("--gguf", help="a file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
