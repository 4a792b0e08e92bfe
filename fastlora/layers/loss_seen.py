"""Which loss ran for a model with a lazy head: the report's line before and after the first step.

A trainer may have a loss of its own, which reads the head's weight and doesn't call the head, such
as TRL's.  So the line promises a loss without logits only until the first optimizer's step.
"""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

# Lazy head -> how the loss of its last call ran: WITHOUT_LOGITS, the reason for logits, or UNCALLED
# if no loss called the head before an optimizer's step.  None: there was no step.
RAN: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
WITHOUT_LOGITS, UNCALLED = "", "uncalled"
_hooks: list = []  # the handle of the hook on all optimizers
# Packages whose replacement of a model's forward calls the original.
_WRAPPERS = {"", "torch", "accelerate", "transformers", "peft", "fastlora"}


def watch(heads: Iterable[nn.Module]) -> None:
    """Watch heads that have become lazy."""
    RAN.update(dict.fromkeys(heads))
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_end_of_step))


def _end_of_step(*_: object) -> None:
    RAN.update({head: UNCALLED for head, how in [*RAN.items()] if how is None})


def line_of_loss(name: str, head: nn.Module, model: nn.Module) -> str:
    """The report's line on a head whose calls are lazy."""
    how, owner = RAN.get(head), _owner_of_forward(model)
    if how == UNCALLED:
        return f"loss of {owner or 'another function'}: it doesn't call {name}"
    if how is None and owner:
        return f"loss of {owner}: it replaced the model's forward, and may not call {name}"
    if how:
        return f"loss with logits: {name}: {how}"
    return f"loss without logits: {name}" + " (no loss ran yet)" * (how is None)


def _owner_of_forward(model: nn.Module) -> str:
    """The module of the function that replaced the forward of a model; "" if it has its own."""
    replaced = [vars(m)["forward"] for m in model.modules() if "forward" in vars(m)]
    functions = [getattr(method, "__func__", method) for method in replaced]
    names = [getattr(each, "__globals__", {}).get("__name__", "") for each in functions]
    return next((name for name in names if name.partition(".")[0] not in _WRAPPERS), "")
