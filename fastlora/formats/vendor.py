"""The protocol of a vendor's file, and the record that it reads from a layer."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..common.other_packages import is_dtensor
from .format import Quantized

SHARDED = "its weight is sharded (DTensor)"  # the reason where PackedLayer.is_whole is False
# Errors from reading a broken layer.
_BROKEN = (AttributeError, LookupError, TypeError, ValueError, RuntimeError)
P = ParamSpec("P")
T = TypeVar("T")


class PackedLayer(NamedTuple):
    """A vendor's linear layer: its weight, and the dtypes of its calls.

    compute_dtype: the dtype of the layer's products; None: x's dtype.
    restores: y has x's dtype whatever ``compute_dtype`` is, also under autocast.
    rounds_input: the layer's own forward rounds x to fewer bits.  fastlora's calls never do.
    """

    weight: Quantized
    compute_dtype: torch.dtype | None = None
    restores: bool = False
    rounds_input: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether calls can read the weight: between calls FSDP keeps only a shard (a DTensor)."""
        return not any(map(is_dtensor, self.weight.tensors))

    def call(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """``run(x)`` in the layer's dtypes."""
        return self.run(x, lambda x: (run(x), None))[0]

    def run(self, x: Tensor, run: Callable[[Tensor], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """The same for a ``run`` that returns a pair; the second is None if x or y was cast."""
        inside = x if self.compute_dtype is None else x.to(self.compute_dtype)
        y, call = run(inside)
        outside = y.to(x.dtype) if self.restores else y
        return outside, call if inside is x and outside is y else None


def checked(what: str) -> Callable[[Callable[P, T]], Callable[P, T | str]]:
    """Decorate a function that reads a layer or a weight of experts: check the tensors it returns.

    If reading or checking fails, the function returns "``what`` broken: …" instead.  ``what`` is a
    phrase such as "its blocks are"; {0} in it is the function's first argument.
    """

    def with_check(read: Callable[P, T]) -> Callable[P, T | str]:
        @wraps(read)
        def read_checked(*args: P.args, **named: P.kwargs) -> T | str:
            try:
                made = read(*args, **named)
                if isinstance(made, Quantized):
                    made.check()
                elif isinstance(made, PackedLayer) and made.is_whole:
                    made.weight.format.check(made.weight.tensors)
            except _BROKEN as error:
                return f"{what.format(*args)} broken: {error}"
            return made

        return read_checked

    return with_check


class Vendor(Protocol):
    """A module with these names.  It never imports its vendor; the layer's module already has."""

    def owns(self, layer: Any, kind: type[nn.Module]) -> bool:
        """Whether this layer is a linear layer of the vendor's: x weightᵀ + bias, by its class.

        ``kind`` is the layer's original class, which fastlora may have replaced.
        """

    def read(self, layer: Any) -> PackedLayer | str:
        """The layer's current weight, or the reason why it can't be read."""
