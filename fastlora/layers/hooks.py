"""What acts on a call of a module besides its class's forward."""

from typing import Any

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether something acts on a call of this module besides its class's forward."""
    own = module.__dict__  # a look-up here takes half the time of an attribute
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or ("forward" in own and not _acts_as_its_class(module))
    )


def _acts_as_its_class(module: nn.Module) -> bool:
    """Whether the forward on this instance does what its class's does.

    It may be accelerate's, which moves inputs to the weight's device, where the fast path asks them
    to be; or the class's own, which accelerate leaves there when its hook is removed.
    """
    own = module.__dict__["forward"]
    if getattr(own, "__func__", None) is type(module).forward and own.__self__ is module:
        return True
    hook: Any = module.__dict__.get("_hf_hook")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and type(hook).__module__ == "accelerate.hooks"
        and not hook.offload
        and not hook.io_same_device
    )
