"""Train on several devices with accelerate: FSDP2, which also shards the base, or DDP.

    torchrun --nproc-per-node 2 several.py --model Qwen/Qwen3-0.6B --data text.txt

Attach adapters before ``accelerator.prepare``.  After it each rank would train a separate adapter,
and only fastlora's report says so.  Without GPUs it runs on CPUs, over gloo.  --out gets the
adapter.
"""

from argparse import ArgumentParser, Namespace
from itertools import chain, islice, repeat
from pathlib import Path

import peft
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora

GPU = torch.cuda.is_available()


def main() -> None:
    options = parse_options()
    accelerator = make_accelerator(options.ddp)
    set_seed(0)  # every rank starts with the same adapter
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = fastlora.get_peft_model(model, lora, loss=True)  # before prepare
    accelerator.print(fastlora.coverage(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    loader = torch.utils.data.DataLoader(read_rows(options), options.batch, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # Notes warn of parameters that each rank trains separately.
    accelerator.print(*fastlora.coverage(model).notes)
    for step, rows in enumerate(islice(chain.from_iterable(repeat(loader)), options.steps), 1):
        loss = model(input_ids=rows, labels=rows).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {loss.item():.4f}")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    model = accelerator.unwrap_model(model)
    adapter = get_model_state_dict(model, options=whole)  # on all ranks
    if accelerator.is_main_process:
        model.save_pretrained(options.out, state_dict=adapter)


def make_accelerator(ddp: bool) -> Accelerator:
    if ddp:
        return Accelerator(cpu=not GPU)
    by_block = {"auto_wrap_policy": "transformer_based_wrap"}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **by_block)
    accelerator = Accelerator(cpu=not GPU, fsdp_plugin=plugin)
    if not GPU:  # accelerate itself would choose DDP on CPUs
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def read_rows(options: Namespace) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(Path(options.data).read_text(), verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // options.length * options.length]).view(-1, options.length)


def parse_options() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    for name, text in {"model": "a Hub id or a folder", "data": "a text file"}.items():
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--ddp", action="store_true", help="a whole model on each device")
    parser.add_argument("--out", default="out/several")
    for name, number in {"steps": 100, "batch": 4, "length": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    return parser.parse_args()


if __name__ == "__main__":
    main()
