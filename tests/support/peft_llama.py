"""A tiny adapted Llama: its gradients, and a plain training loop."""

from collections.abc import Callable, Iterable

import peft
import torch
from models import tiny_llama
from peft_models import BATCH, adapted
from torch import Tensor, nn

from fastlora.peft.baseline import shared_masks

LAYERS = 14  # 7 in each of the 2 blocks
STEPS = 6
# The tolerance in float64.  The largest error measured over 14 seeds is 5e-13, but transformers
# computes norms and the loss in float32 in any model, and one different bit may change a rounding.
ROUNDING = 1e-8
DATA = {"input_ids": BATCH, "labels": BATCH}
REENTRANT, NOT_REENTRANT = {"use_reentrant": True}, {"use_reentrant": False}


def llama(blocks: int = 2, **settings) -> peft.PeftModel:
    """A Llama in float64.  All its linear layers have an adapter with dropout."""
    config = {"target_modules": "all-linear", "lora_dropout": 0.1} | settings
    return adapted(tiny_llama(num_hidden_layers=blocks), **config).double()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, by PEFT's names."""
    named = model.named_parameters()
    return {name.removeprefix("_orig_mod."): p for name, p in named if p.requires_grad}


def result(model: nn.Module, losses: Iterable[float]) -> dict[str, Tensor]:
    """The losses of a training, and the trainable parameters after it."""
    found = {"losses": torch.tensor(list(losses), dtype=torch.float64)}
    return found | {name: p.detach() for name, p in trained(model).items()}


def gradients(model: nn.Module, data: dict[str, Tensor] = DATA) -> dict[str, Tensor]:
    """The loss and its gradients in training mode.

    Each call uses the same random state and the same dropout masks.
    """
    torch.manual_seed(7)
    with shared_masks(model.train()):
        loss = model(**data).loss
        loss.backward()
    found = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def adamw(parameters: Iterable[Tensor], **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=5e-3, **settings)


def train(
    model: nn.Module,
    make: Callable[..., torch.optim.Optimizer] = adamw,
    *,
    steps: int = STEPS,
    data: dict[str, Tensor] = DATA,
) -> dict[str, Tensor]:
    """The losses of all steps, and the parameters after them."""
    torch.manual_seed(7)
    optimizer, losses = make(list(trained(model.train()).values())), []
    with shared_masks(model):
        for _ in range(steps):
            loss = model(**data).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    return result(model, losses)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=BATCH).logits
