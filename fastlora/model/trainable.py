"""Lets a Trainer accept a quantized model with adapters, and refuse checkpoints it can't write."""

from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any

from torch import nn

from ..foreign import derived_from
from ..layers.classes import change_class, class_over
from .declare import QUANTIZER

# Whether the Trainer that is being made checkpoints only adapters.  A context variable, because
# Trainer's constructor asks the quantizer, and nothing in between passes the trainer on.
_adapters_only = ContextVar("_adapters_only", default=False)


class _Trainable(ABC):  # noqa: B024 (HfQuantizer's base: __class__ takes only a class of like layout)
    """A mixin for classes of quantizers that says the model can be trained.

    ``transformers.Trainer`` accepts a quantized model if it has PEFT's adapters, or if both
    properties are true.  They are true here, because fastlora's layers compute gradients over every
    quantized base that they accept.
    """

    @property
    def is_trainable(self) -> bool:
        check_savable(self)
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def check_savable(quantizer: Any) -> None:
    """Raise ValueError if Trainer's first checkpoint of the whole model would fail.

    Without this check the run would stop at that checkpoint, hours after its start.
    """
    safe = (True,) if signature(quantizer.is_serializable).parameters else ()  # transformers 4
    if not (_adapters_only.get() or quantizer.is_serializable(*safe)):
        method = getattr(quantizer.quantization_config, "quant_method", "")
        raise ValueError(
            f"transformers can't save this quantized base ({getattr(method, 'value', method)}), "
            "and transformers.Trainer's checkpoints hold it: use fastlora.trainer.AdapterTrainer, "
            "whose checkpoints hold only the adapter"
        )


@contextmanager
def saving_adapters_only() -> Iterator[None]:
    """Inside, a Trainer's constructor may accept a base that can't be saved."""
    token = _adapters_only.set(True)
    try:
        yield
    finally:
        _adapters_only.reset(token)


def admit_training(model: nn.Module) -> None:
    """Make the model's quantizer, if it has one, say that the model can be trained."""
    quantizer: Any = model.__dict__.get(QUANTIZER)
    kind: Any = type(quantizer)
    if derived_from(kind, "transformers", "HfQuantizer") and not hasattr(kind, "plain_class"):
        change_class(quantizer, class_over(_Trainable, kind, ""))


def give_back_quantizer(model: nn.Module) -> None:
    """Undo :func:`admit_training`."""
    quantizer: Any = model.__dict__.get(QUANTIZER)
    if hasattr(quantizer, "plain_class"):
        change_class(quantizer, quantizer.plain_class)
