"""Settings that save less for the backward: the loss without logits, LoRA-FA, checkpointing."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..layers.head import why_no_lazy_head
from ..model.config import LoRAConfig
from ..model.inject import apply_lora, undo_injection


def savings_of(model: nn.Module) -> dict[str, dict[str, bool]]:
    """The arguments of :func:`adapted` for each saving that the model can use, by its name.

    The last one, "all of these", has the arguments of all others.
    """
    found = {"lora_A frozen": {"freezes_a": True}}
    if not why_no_lazy_head(model):
        found["loss without logits"] = {"loss": True}
    if _switches(model):
        found["gradient checkpointing"] = {"checkpointing": True}
    together = {key: True for each in found.values() for key in each}
    return found | ({"all of these": together} if len(found) > 1 else {})


@contextmanager
def adapted(
    model: nn.Module,
    config: LoRAConfig,
    *,
    loss: bool = False,
    freezes_a: bool = False,
    checkpointing: bool = False,
) -> Iterator[None]:
    """Inside, the model has adapters; at the end it is as before.

    ``freezes_a`` trains only lora_B (LoRA-FA, arXiv 2308.03303).  ``checkpointing`` is
    transformers' gradient checkpointing of each layer.
    """
    apply_lora(model, config, loss=loss)
    with ExitStack() as stack:
        stack.callback(undo_injection, model)
        for name, parameter in model.named_parameters():
            if freezes_a and name.endswith("lora_A"):
                parameter.requires_grad_(False)
        if checkpointing:
            stack.enter_context(_checkpointed(model))
        yield


def _switches(model: nn.Module) -> list[dict[str, Any]]:
    """The ``__dict__`` of each module that transformers can checkpoint."""
    return [vars(m) for m in model.modules() if hasattr(m, "gradient_checkpointing")]


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Inside, checkpointing is on.  transformers' own methods leave hooks and attributes behind."""
    function = partial(checkpoint, use_reentrant=False)
    with ExitStack() as stack:
        for switches in _switches(model):
            stack.callback(switches.update, {**switches})
            stack.callback(switches.clear)
            switches |= {"gradient_checkpointing": True, "_gradient_checkpointing_func": function}
        yield
