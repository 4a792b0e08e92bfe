"""What an optimised PEFT layer becomes: the same layer with another forward."""

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from operator import is_
from typing import Any

from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ..backends import Call
from ..layers.frozen import fits
from ..ops.door import run
from ..ops.dora import dora_linear, dora_norm
from ..ops.functional import lora_linears
from ..ops.kinds import key_of, known, may_be_known, remember
from ..projection import Adapter, Output, flatten, layouts_of
from .mixed import mixed_forward
from .moment import adapters_now, is_peft_s_few, why_not_now
from .reading import Glance, Reading, glance, read


class Linear(PeftLinear):
    """PEFT's LoRA layer of a linear layer, whose ordinary call is one fused node (two for DoRA).

    It has PEFT's name and no state of its own: a PEFT layer becomes one, and ceases to be one, by
    its ``__class__``.  Calls that :mod:`.moment` and :mod:`.reading` don't allow are PEFT's.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return _call(self, super().forward, x, args, kwargs)


# PEFT's layers of quantised bases, where PEFT has them: some only where the vendor's package is.
_PACKED = {
    "peft.tuners.lora.bnb": ("Linear4bit", "Linear8bitLt"),
    "peft.tuners.lora.torchao": ("TorchaoLoraLinear",),
    "peft.tuners.lora.hqq": ("HqqLoraLinear",),
    "peft.tuners.lora.gptq": ("GPTQLoraLinear",),
}


def packed_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """What layers of quantised bases become, by PEFT's classes of them that are imported."""
    places = [(sys.modules.get(place), names) for place, names in _PACKED.items()]
    found = [getattr(module, name, None) for module, names in places for name in names]
    return {kind: _packed_class(kind) for kind in found if kind is not None}


def __getattr__(name: str) -> type[nn.Module]:
    """The class of a pickled layer, in a process that has made none."""
    for place, names in _PACKED.items():
        if name in names:
            return _packed_class(getattr(import_module(place), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _packed_class(kind: Any) -> type[nn.Module]:
    class Packed(kind):
        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            return _call(self, super().forward, x, args, kwargs)

    Packed.__doc__ = f"As :class:`Linear`: PEFT's ``{kind.__name__}``."
    Packed.__name__ = Packed.__qualname__ = kind.__name__
    return Packed


def _call(
    layer: LoraLayer,
    theirs: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """A layer's forward: the fast one, or PEFT's, which is ``theirs``."""
    if not (args or kwargs) and is_peft_s_few(layer, x):
        return theirs(x)
    y = None
    if not args and not why_not_now():
        if not kwargs:
            y = _ordinary_forward(layer, x)
        elif kwargs.keys() == {"adapter_names"}:
            y = mixed_forward(layer, x, kwargs["adapter_names"])
    return theirs(x, *args, **kwargs) if y is None else y


def _ordinary_forward(layer: LoraLayer, x: Tensor) -> Tensor | None:
    """The output for x with the active adapters; None where the call is PEFT's."""
    names = adapters_now(layer)
    if not names:
        return None
    seen = glance(layer, names, x) if may_be_known(x) else None
    found = None if seen is None else known(*seen)
    if found is not None:
        return fast_forward(x, names[0], found, seen)
    reading = read(layer, names)
    if reading.output is None or not fits(x, reading.output.base.weight):
        return None
    return fast_forward(x, names[0], reading, seen)


def fast_forward(x: Tensor, name: str, found: Call | Reading, seen: Glance | None) -> Tensor:
    """The output for x by fastlora's ops; ``name`` is that of the first active adapter.

    ``found``: what a call like this was known to be, or else the layer's reading.
    """
    if isinstance(found, Call):
        assert seen is not None
        return run(seen.inputs, found)[0]
    output, p = found.output, max(found.dropouts)
    assert output is not None
    if found.packed is not None:
        as_plain = found._replace(packed=None)
        return found.packed.call(x, lambda x: fast_forward(x, name, as_plain, None))
    if found.magnitude is None:
        y = lora_linears(x, (output,), dropout=p)[0]
        if seen is not None:
            _remember(seen, output, p)
        return y
    (weight, bias), (adapter,) = output
    lora_a, lora_b, scale = adapter
    y = dora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        found.magnitude.weight,
        bias=bias,
        scale=scale,
        drop=found.drop if p > 0.0 else None,
        norm=_norm(found.magnitude, weight, adapter, adapter_name=name),
    )
    return y if x.dim() > 1 else y.unsqueeze(0)  # PEFT's gain is [1, N], and so is this output


def _remember(seen: Glance, output: Output[Tensor], p: float) -> None:
    """That a call like this one was ``lora_linears`` of what the glance saw, if it was."""
    tensors = flatten((output,), layouts_of((output,)))
    x, *others = seen.inputs
    if len(tensors) == len(others) and all(map(is_, tensors, others)):
        call = known(*key_of(x, (output,), p, True, None))
        if call is not None:
            remember(*seen, call)


@dora.cache_decorator("weight-norm")  # kept as PEFT keeps it: in DoraCaching, in evaluation
def _norm(
    magnitude: dora.DoraLinearLayer, weight: Tensor, adapter: Adapter[Tensor], *, adapter_name: str
) -> Tensor:
    """The norms of the rows of a DoRA layer's weight."""
    return dora_norm(weight, *adapter)
