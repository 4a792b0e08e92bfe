"""``with fastlora.merged(model):`` samples at the base model's speed, and then restores every bit.

Computing a merge and its reverse changes a 16-bit weight slightly, and a loop of reinforcement
learning does so thousands of times.  This context manager keeps the originals and puts them back.
"""

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from .layers.merging import merge_each
from .layers.modules import check_model, unwrap
from .peft.merged import active, adapted_weights, merge_layer, why_not_merged
from .peft.optimize import peft_layers
from .report import NO_LAYERS
from .text import shown

_PLACES = ("device", "cpu")


class merged:  # noqa: N801  # lower case, because it is used like a function
    """A context manager that merges the model's active adapters into its weights.

    ``model`` is a PeftModel, optimized or not, or any module with PEFT's layers.
    After the block, also after an exception, the original parameters are back, so every weight has
    its former bits.  Inside of the block adapters get no gradient.

    ``keep`` says where the originals stay inside of the block:

    * "device": on their device, beside the merged weights, which take ``bytes`` more there;
    * "cpu": in the host's memory, moved layer by layer.  Weights that are tied to another module's
      stay on their device.

    PEFT's layers are merged by PEFT, in a copy.  This covers DoRA, several active adapters, experts
    and bitsandbytes' layers.  bitsandbytes quantizes the merged weights again, so their samples
    differ slightly.  Layers whose adapters are disabled don't change.

    ``print(fastlora.merged(model))`` shows the memory that it takes.  Entering raises ValueError
    and changes nothing if the model has no LoRA layers, is merged already, is sharded or on the
    meta device, if a layer can't be merged, or if merged weights have NaN or infinity.
    """

    def __init__(self, model: nn.Module, *, keep: str = "device") -> None:
        check_model(model)
        if keep not in _PLACES:
            raise ValueError(f"keep is {shown(keep)}, but must be 'device' or 'cpu'")
        self.model, self.keep = model, keep
        inner = unwrap(model)
        self._peft = peft_layers(inner)
        if not self._peft:
            raise ValueError(f"the model has {NO_LAYERS}")
        weights = adapted_weights(self._peft)
        # The bytes of merged copies.  A packed weight is packed again.
        plain = [(w,) if isinstance(w, Tensor) else w.tensors for w in weights]
        self.bytes = sum(tensor.nbytes for tensors in plain for tensor in tensors)
        self._inside = ExitStack()

    def __str__(self) -> str:
        count, size = len(self._peft), self.bytes / 2**20
        where = "on the CPU" if self.keep == "cpu" else "on their device"
        return f"{count} layers; merged weights take {size:,.0f} MiB, the originals stay {where}"

    def __enter__(self) -> nn.Module:
        if reason := why_not_merged(self._peft):
            raise ValueError(reason)
        model, to_cpu = self.model, self.keep == "cpu"
        with ExitStack() as stack:
            stack.enter_context(merge_each(model, active(self._peft), merge_layer, to_cpu))
            self._inside = stack.pop_all()
        return self.model

    def __exit__(self, *error: Any) -> None:
        self._inside.close()
