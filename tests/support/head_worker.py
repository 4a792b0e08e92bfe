"""Functions that a rank runs: steps of a model whose head is lazy, under DDP and FSDP."""

from typing import Any

import peft
import peft_worker as training
import torch
from models import randomize, tiny_llama
from peft_worker import flat, shard
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora.layers.logits import LazyLogits


def model_with_head() -> nn.Module:
    torch.manual_seed(1)
    base = tiny_llama(hidden_size=32, intermediate_size=48)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    return randomize(peft.get_peft_model(base, config)).train()


def steps(wrap: str, loss: bool, **settings: Any) -> tuple[list[float], dict[str, Tensor], bool]:
    """The losses of two steps, the gradients of the last one, and whether logits were lazy."""
    model = fastlora.optimize(model_with_head(), loss=loss)
    kinds = {"fsdp1": flat, "fsdp2": shard, "ddp": DistributedDataParallel}
    wrapped: Any = kinds[wrap](model, **settings)
    ids, losses = training.own_part(), []
    for _ in range(2):
        wrapped.zero_grad()
        out = wrapped(input_ids=ids, labels=ids)
        out.loss.backward()
        losses.append(float(out.loss.detach()))
    gradients = {} if wrap == "fsdp1" else dict(training.trained(model))
    found = {name: training.whole(p.grad) for name, p in gradients.items()}
    return losses, found, isinstance(out.logits, LazyLogits) and out.logits.call.logits is None
