"""What a rank does in the tests of 4-bit layers under FSDP2: a gated MLP of them, and its step."""

from typing import NamedTuple

import peft
import torch
from bnb_layers import quantised
from fast_calls import counted_blocks
from peft_worker import whole
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import fastlora
from fastlora.layers.mlp import PARTS


class Step(NamedTuple):
    """A training step: its numbers, how many blocks it called, and the report after it."""

    numbers: list[Tensor]
    blocks: int
    report: str


def step(model: nn.Module) -> Step:
    """The same in every rank, so that means over ranks are those of one."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    with counted_blocks() as calls:
        y = model(x)
    y.float().square().mean().backward()
    gradients = [whole(p.grad) for p in model.parameters() if p.requires_grad]
    return Step([y.detach(), *gradients], len(calls), str(fastlora.coverage(model)))


def adapted(
    kind: str, storage: torch.dtype = torch.uint8, compute: torch.dtype = torch.float32
) -> nn.Module:
    """``kind``: own, peft, or optimized; with the same weights in every process."""
    torch.manual_seed(1)
    block = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=128))
    for name in PARTS:
        sizes = (128, 64) if name == "down_proj" else (64, 128)
        setattr(block, name, quantised("nf4", *sizes, compute, quant_storage=storage))
    settings = {"r": 3, "target_modules": list(PARTS), "init_lora_weights": False}
    model = nn.Sequential(block).requires_grad_(False)
    if kind == "own":
        return fastlora.apply_lora(model, fastlora.LoRAConfig(**settings))
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    if kind == "optimized":
        fastlora.optimize(model)
    return model


def sharded(kind: str, storage: torch.dtype, units: str, cast: torch.dtype | None) -> Step:
    """``units``: what is sharded by itself, beside the model.  ``cast``: FSDP's param_dtype."""
    model = adapted(kind, storage, cast or torch.float32)
    (block,) = [module for module in model.modules() if isinstance(module, LlamaMLP)]
    of = {"model": [], "block": [block], "layers": [getattr(block, name) for name in PARTS]}
    for module in (*of[units], model):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=cast))
    return step(model)


def cast_storage() -> str:
    """The error of a layer whose packed numbers FSDP casts to another dtype."""
    try:
        return sharded("own", torch.bfloat16, "model", torch.float16).report
    except ValueError as error:
        return str(error)
