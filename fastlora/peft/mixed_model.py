"""What an optimised model of PEFT's becomes: the same one, whose mixed batches may train.

PEFT refuses ``adapter_names`` in training, where its own code would be right, with two exceptions:
activation checkpointing runs layers again in the backward, when PEFT's hooks are gone and with them
the names; and the hooks stay for ever where a call fails.  Both are seen to here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel as PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

_CHECKPOINT = "_gradient_checkpointing_func"  # transformers': how a module calls its blocks


class LoraModel(PeftModel):
    """PEFT's model around the layers.  It has PEFT's name, and no state of its own."""

    training: bool  # nn.Module's

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        with ExitStack() as stack:
            training: bool = self.training
            # All that PEFT asks it for; its layers and dropouts are asked themselves.
            self.training = training and names is None
            try:
                hooks.__enter__()
            finally:
                self.training = training
            stack.callback(hooks.__exit__, None, None, None)  # an error or not
            if names is not None and torch.is_grad_enabled():  # else there is no backward
                stack.enter_context(_carried(self, list(names)))
            yield


@contextmanager
def _carried(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, what checkpointing runs again in the backward has these names again."""
    own = [module for module in model.modules() if _CHECKPOINT in module.__dict__]
    before = [module.__dict__[_CHECKPOINT] for module in own]
    for module, checkpoint in zip(own, before, strict=True):
        module.__dict__[_CHECKPOINT] = partial(_checkpointed, checkpoint, module, names)
    try:
        yield
    finally:
        for module, checkpoint in zip(own, before, strict=True):
            module.__dict__[_CHECKPOINT] = checkpoint


def _checkpointed(
    checkpoint: Callable,
    module: nn.Module,
    names: Sequence[str],
    function: Callable,
    *args: Any,
    **kwargs: Any,
) -> Any:
    return checkpoint(partial(_named, module, names, function), *args, **kwargs)


def _named(
    module: nn.Module, names: Sequence[str], function: Callable, *args: Any, **kwargs: Any
) -> Any:
    """function(…), in which the layers of the module have these names."""

    def give(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"adapter_names": names}

    handles = [
        layer.register_forward_pre_hook(give, with_kwargs=True)
        for layer in module.modules()
        if isinstance(layer, LoraLayer | AuxiliaryTrainingWrapper)
    ]
    try:
        return function(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
