"""What a rank does in the tests of own models, and of many adapters, on several devices."""

from collections.abc import Sequence
from typing import Any

import peft
import torch
import torch.distributed as dist
from models import Mlp, randomise
from moe_models import IDS, base_model, parameters_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastlora

Found = dict[str, Tensor | None]
# A rank's half has no sample of "s", and the other's none of "q"; nobody has "t".
NAMES = ["p", "q", "__base__", "p", "s", "p", "s", "s"]
ALL = ["p", "q", "s", "t"]


def gradients(model: nn.Module) -> Found:
    """Of all that trains, whole, by the names in the unwrapped model."""
    found: Found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            found[name.removeprefix("module.")] = gradient
    return found


def own(values: Any, ranks: int) -> Any:
    """This rank's part of a batch; all of it for one process alone."""
    if ranks == 1:
        return values
    size, rank = len(values) // ranks, dist.get_rank()
    return values[size * rank : size * (rank + 1)]


def train(model: nn.Module, ranks: int, settings: dict, *inputs: Any, **options: Any) -> Found:
    """Two steps without an optimizer: in the second, DDP has its buckets in another order."""
    running = DistributedDataParallel(model, **settings) if ranks > 1 else model
    for _ in range(2):
        model.zero_grad()
        running(*inputs, **options).square().mean().backward()
    return gradients(model)


def mixed_peft(ranks: int, names: Sequence[str] = NAMES, **settings) -> Found:
    """An optimised PEFT model, whose samples name their adapters."""
    torch.manual_seed(0)
    model = Mlp()
    for i, name in enumerate(ALL):
        config = peft.LoraConfig(r=2 + i, target_modules=["up", "down"])
        if i == 0:
            model = peft.get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(ALL)
    fastlora.optimize(randomise(model))
    x = torch.randn(len(names), 5, 8)
    return train(model, ranks, settings, own(x, ranks), adapter_names=own(list(names), ranks))


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        targets = {"target_modules": ["q_proj"], "target_parameters": parameters_of("qwen3")}
        config = fastlora.LoRAConfig(r=4, **targets)
        self.model = randomise(fastlora.apply_lora(base_model(), config), 0.1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def own_layers(ranks: int, folder: str = "") -> Found:
    """A model with apply_lora's adapters; the first rank saves them from inside of DDP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    targets = {"target_modules": ["0", "2"], "init_lora_weights": False}
    fastlora.apply_lora(model, fastlora.LoRAConfig(r=2, **targets))
    found = train(model, ranks, {}, own(torch.randn(8, 12), ranks))
    wrapped = DistributedDataParallel(model) if folder else model
    if folder and dist.get_rank() == 0:
        fastlora.save_adapter(wrapped, folder)
    return found


def experts(ranks: int, engine: str = "", **settings) -> Found:
    """A model with adapters on its experts, as apply_lora makes them."""
    model, ids = Logits(), own(IDS, ranks)
    if engine == "fsdp2":
        for block in (*model.model.model.layers, model):
            fully_shard(block)
        for _ in range(2):
            model.zero_grad()
            model(ids).square().mean().backward()
        return gradients(model)
    return train(model, ranks, settings, ids)
