"""Lets a Trainer accept quantized models that their quantizer takes for untrainable, as GGUF's."""

from abc import ABC
from typing import Any

from torch import nn

from ..common.other_packages import derived_from
from ..layers.classes import change_class, class_over


class _Trainable(ABC):  # noqa: B024 (HfQuantizer's base: __class__ takes only a class of like layout)
    """A mixin for classes of quantizers that says the model can be trained.

    ``transformers.Trainer`` refuses a PEFT model whose quantizer isn't trainable, such as GGUF's.
    fastlora's layers compute gradients over every quantized base that they accept.
    """

    is_trainable = property(lambda self: True)
    is_qat_trainable = property(lambda self: True)


def admit_training(model: nn.Module) -> None:
    """Make the model's quantizer, if it has one, say that the model can be trained."""
    quantizer: Any = model.__dict__.get("hf_quantizer")
    kind: Any = type(quantizer)
    if derived_from(kind, "transformers", "HfQuantizer") and not hasattr(kind, "plain_class"):
        change_class(quantizer, class_over(_Trainable, kind, ""))
