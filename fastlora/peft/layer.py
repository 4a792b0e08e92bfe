"""What an optimised PEFT layer becomes: the same layer with another forward."""

from collections.abc import Callable
from operator import is_
from typing import Any

from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from ..backends import Call
from ..layers.frozen import fits
from ..ops import dora_linear, dora_norm, lora_linears
from ..ops.door import run
from ..ops.kinds import key_of, known, may_be_known, remember
from ..projection import Adapter, Output, flatten, layouts_of
from .mixed import mixed_forward
from .moment import why_not_now
from .reading import Glance, Reading, active_adapters, glance, read


class Linear(PeftLinear):
    """PEFT's LoRA layer of a linear layer, whose ordinary call is one fused node (two for DoRA).

    It has PEFT's name and no state of its own: a PEFT layer becomes one, and ceases to be one, by
    its ``__class__``.  Calls that :mod:`.moment` and :mod:`.reading` don't allow are PEFT's.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return call(self, super().forward, x, args, kwargs)


def call(
    layer: LoraLayer,
    theirs: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """A layer's forward: the fast one, or PEFT's, which is ``theirs``."""
    names = active_adapters(layer)
    alone = layer.disable_adapters or layer.merged or not names  # the base layer's call
    if not (alone or args or kwargs or why_not_now()):
        seen = glance(layer, names, x) if may_be_known(x) else None
        settings = None if seen is None else known(*seen)
        if settings is not None:
            return fast_forward(x, names[0], settings, seen)
        reading = read(layer, names)
        if reading.output is not None and fits(x, reading.output.base.weight):
            return fast_forward(x, names[0], reading, seen)
    elif kwargs.keys() == {"adapter_names"} and not (args or why_not_now()):
        y = mixed_forward(layer, x, kwargs["adapter_names"])
        if y is not None:
            return y
    return theirs(x, *args, **kwargs)


def fast_forward(x: Tensor, name: str, found: Call | Reading, seen: Glance | None) -> Tensor:
    """The output for x by fastlora's ops; ``name`` is that of the first active adapter.

    ``found``: what a call like this was known to be, or else the layer's reading.
    """
    if isinstance(found, Call):
        assert seen is not None
        return run(seen.inputs, found)[0]
    reading = found
    assert reading.output is not None
    if reading.packed is not None:
        as_plain = reading._replace(packed=None)
        return reading.packed.call(x, lambda x: fast_forward(x, name, as_plain, None))
    if reading.magnitude is None:
        y = lora_linears(x, (reading.output,), dropout=reading.p)[0]
        if seen is not None:
            _remember(seen, reading.output, reading.p)
        return y
    (weight, bias), (adapter,) = reading.output
    lora_a, lora_b, scale = adapter
    y = dora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        reading.magnitude.weight,
        bias=bias,
        scale=scale,
        drop=reading.dropout if reading.p > 0.0 else None,
        norm=_norm(reading.magnitude, weight, adapter, adapter_name=name),
    )
    return y if x.dim() > 1 else y.unsqueeze(0)  # PEFT's gain is [1, N], and so is this output


def _remember(seen: Glance, output: Output[Tensor], p: float) -> None:
    """That a call like this one was ``lora_linears`` of what the glance saw, if it was."""
    tensors = flatten((output,), layouts_of((output,)))
    x, *others = seen.inputs
    if len(tensors) == len(others) and all(map(is_, tensors, others)):
        settings = known(*key_of(x, (output,), p, True, None))
        if settings is not None:
            remember(*seen, settings)


@dora.cache_decorator("weight-norm")  # kept as PEFT keeps it: in DoraCaching, in evaluation
def _norm(
    magnitude: dora.DoraLinearLayer, weight: Tensor, adapter: Adapter[Tensor], *, adapter_name: str
) -> Tensor:
    """The norms of the rows of a DoRA layer's weight."""
    return dora_norm(weight, *adapter)
