"""transformers' quantizer of a model with adapters: what Trainer asks it before it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from inspect import signature
from typing import Any

from torch import nn

from ..foreign import derived_from

_NAME = "hf_quantizer"
_adapters_alone = ContextVar("_adapters_alone", default=False)


@cache
def _trainable(kind: Any) -> Any:
    """The class of quantizers of this ``kind``, of models with adapters.

    ``transformers.Trainer`` takes a quantised model if it has PEFT's adapters, or if these two are
    true.  They are: fastlora's layers give gradients over any base that it reads.
    """

    class Trainable(kind):
        plain_class = kind

        @property
        def is_trainable(self) -> bool:
            check_savable(self)
            return True

        @property
        def is_qat_trainable(self) -> bool:
            return True

        def __reduce_ex__(self, protocol: Any) -> tuple:  # nobody can import this class
            return _blank, (kind,), vars(self)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Trainable, name, getattr(kind, name))
    return Trainable


def _blank(kind: Any) -> Any:
    return object.__new__(_trainable(kind))


def check_savable(quantizer: Any) -> None:
    """Raise ValueError if Trainer's first checkpoint, of the whole model, would fail."""
    safe = (True,) if signature(quantizer.is_serializable).parameters else ()  # transformers 4
    if not (_adapters_alone.get() or quantizer.is_serializable(*safe)):
        method = getattr(quantizer.quantization_config, "quant_method", "")
        raise ValueError(
            f"transformers can't save this quantised base ({getattr(method, 'value', method)}), "
            "which transformers.Trainer's checkpoints hold: use fastlora.trainer.AdapterTrainer, "
            "whose checkpoints hold the adapter alone"
        )


@contextmanager
def saving_adapters_alone() -> Iterator[None]:
    """A trainer made in here never saves the base."""
    token = _adapters_alone.set(True)
    try:
        yield
    finally:
        _adapters_alone.reset(token)


def admit_training(model: nn.Module) -> None:
    """Let the model's quantizer, if it has one, say that the model can be trained."""
    quantizer: Any = model.__dict__.get(_NAME)
    kind: Any = type(quantizer)
    if derived_from(kind, "transformers", "HfQuantizer") and not hasattr(kind, "plain_class"):
        quantizer.__class__ = _trainable(kind)


def give_back_quantizer(model: nn.Module) -> None:
    """What it was before :func:`admit_training`."""
    quantizer: Any = model.__dict__.get(_NAME)
    if hasattr(quantizer, "plain_class"):
        quantizer.__class__ = quantizer.plain_class
