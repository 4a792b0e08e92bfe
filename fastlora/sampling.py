"""``with fastlora.merged(model):`` samples at the base model's speed, and then restores every bit.

Computing a merge and its reverse changes a 16-bit weight slightly, and a loop of reinforcement
learning does so thousands of times.  This context manager restores the originals.
"""

from contextlib import ExitStack
from typing import Any

from torch import nn

from .layers.modules import check_model, unwrap
from .peft.merged import active, bytes_of, lock, merge_layers, why_not_merged
from .peft.targets import peft_layers
from .report import NO_LAYERS
from .text import shown

_PLACES = ("corrections", "device", "cpu")


class merged:  # noqa: N801  # lower case, because it is used like a function
    """A context manager that merges the model's active adapters into its weights.

    ``model`` is a PeftModel, optimized or not, or any module with PEFT's layers.
    After the block, also after an exception, the original parameters are back, so every weight has
    its former bits, even if adapters changed inside.

    ``keep`` says which part of the original weights is kept inside of the block:

    * "corrections": for dense 16-bit weights of PEFT's layers, the adapters and 0.25 to 0.35 bytes
      for each weight, from which the originals are rebuilt.  The merged weights lie in their
      memory, so another model that shares it sees them.  Other weights are kept on their device;
    * "device": all originals, on their device, beside the merged weights.  On a CPU, entering and
      leaving takes a third to a fifth of the time that corrections need;
    * "cpu": all originals, in the host's memory, moved layer by layer.  Weights that are tied to
      another module's stay on their device.

    PEFT's layers are merged by PEFT.  This covers DoRA, several active adapters and experts.  A
    packed base is dense inside, and packed again, with the same bits, afterwards.  Layers whose
    adapters are disabled don't change.

    Inside of the block adapters get no gradient: the backward of a call in training raises
    RuntimeError.  In evaluation, outputs need no gradient (unless an input does), so torch raises
    its own error.  PEFT's ``disable_adapter()`` and ``unmerge_adapter()`` give the exact originals,
    and after ``disable_adapter()`` the model is merged again.  Nested blocks, and blocks of several
    threads, share one merge.  Leaving raises RuntimeError if the originals can't be rebuilt because
    merged weights were written to, or cast to fewer bits.

    ``print(fastlora.merged(model))`` shows the memory that it takes, and ``bytes`` is its number.
    Entering raises ValueError and changes nothing if the model has no LoRA layers, is merged by
    PEFT or with other adapters, is sharded or on the meta device, if a layer can't be merged, or if
    merged weights have NaN or infinity.
    """

    def __init__(self, model: nn.Module, *, keep: str = "corrections") -> None:
        check_model(model)
        if keep not in _PLACES:
            raise ValueError(f"keep is {shown(keep)}, but must be 'corrections', 'device' or 'cpu'")
        self.model, self.keep = model, keep
        inner = unwrap(model)
        self._peft = peft_layers(inner)
        if not self._peft:
            raise ValueError(f"the model has {NO_LAYERS}")
        self.bytes = bytes_of(inner, self._peft, keep)
        self._inside: list[ExitStack] = []  # one for each block that was entered

    def __str__(self) -> str:
        count, size = len(self._peft), self.bytes / 2**20
        return f"{count} layers; merging takes {size:,.0f} MiB (keep={self.keep!r})"

    def __enter__(self) -> nn.Module:
        model = self.model
        with lock, ExitStack() as stack:
            if reason := why_not_merged(self._peft):
                raise ValueError(reason)
            stack.enter_context(merge_layers(model, active(self._peft), self.keep))
            self._inside.append(stack.pop_all())
        return self.model

    def __exit__(self, *error: Any) -> None:
        with lock:
            self._inside.pop().close()
