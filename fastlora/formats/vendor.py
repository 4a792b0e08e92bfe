"""What a vendor's file is: the contract that each of them keeps, and what it reads from a layer."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..foreign import is_dtensor
from .format import Quantized

SHARDED = "its weight is sharded (DTensor)"  # why a PackedLayer that isn't whole isn't called
# What reading a broken layer raises.
_BROKEN = (AttributeError, LookupError, TypeError, ValueError, RuntimeError)
P = ParamSpec("P")
T = TypeVar("T")


class PackedLayer(NamedTuple):
    """A vendor's linear layer: its weight, and which dtypes its calls go through.

    ``compute_dtype``: that in which it computes; None: in x's.  ``restores``: whether y has x's
    dtype nevertheless, and under autocast too.  ``rounds_input``: whether its own forward, without
    an adapter, rounds x to fewer bits, which no call here does.
    """

    weight: Quantized
    compute_dtype: torch.dtype | None = None
    restores: bool = False
    rounds_input: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether a call can read it: FSDP has a part of a tensor between calls (a DTensor)."""
        return not any(map(is_dtensor, self.weight.tensors))

    def call(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``run`` makes of x in the layer's dtypes."""
        return self.run(x, lambda x: (run(x), None))[0]

    def run(self, x: Tensor, run: Callable[[Tensor], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """The same, and what ``run`` says beside; None if x or what comes out had to be cast."""
        inside = x if self.compute_dtype is None else x.to(self.compute_dtype)
        y, call = run(inside)
        outside = y.to(x.dtype) if self.restores else y
        return outside, call if inside is x and outside is y else None


def checked(what: str) -> Callable[[Callable[P, T]], Callable[P, T | str]]:
    """What reads a layer, or a weight of experts, with a check of the tensors that it reads.

    Where either fails it says that ``what`` is broken, "its blocks are"; {0} is its argument.
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
    """A module with these.  It never imports its vendor: who has such a layer did.

    ``PARTS`` names the attributes of a layer that are its weight: the packed tensor, then others.
    """

    PARTS: tuple[str, ...]

    def owns(self, layer: Any, kind: type[nn.Module]) -> bool:
        """Whether this layer, which by itself is of class ``kind``, is a linear one of theirs.

        It computes x weightᵀ + bias, as far as its class can tell.
        """

    def read(self, layer: Any) -> PackedLayer | str:
        """The layer's weight as it is now, or why it can't be read."""

    def pack(self, layer: Any, weight: Tensor) -> None:
        """Make weight [N, K] the layer's own, packed as the layer's is by the vendor's quantizer.

        What was there stays as it is, in no place.  Raises ValueError where there is no such.
        """


class Once:
    """A question about a tensor's values, asked once: on a GPU the answer waits for it.

    A tensor that changed is looked at again.
    """

    def __init__(self) -> None:
        self._seen = WeakTensorKeyDictionary()  # of each tensor: its version, and the answer

    def ask(self, tensor: Tensor, question: Callable[[Tensor], bool]) -> bool:
        """False in a graph of torch.compile's, which holds no value of a tensor."""
        if torch.compiler.is_compiling():
            return False
        version = None if tensor.is_inference() else tensor._version
        seen = self._seen.get(tensor)
        if seen is None or seen[0] != version:
            seen = self._seen[tensor] = version, question(tensor)
        return seen[1]
