"""What an optimised PEFT layer becomes: the same layer with another forward."""

from operator import is_

from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor

from ..frozen import fits
from ..ops import dora_linear, dora_norm, lora_linears
from ..ops.functional import run
from ..ops.kinds import key_of, known, may_be_known, remember
from ..projection import Adapter, flatten, layouts_of
from .moment import why_not_now
from .reading import Glance, Reading, active_adapters, glance, read


class Linear(PeftLinear):
    """PEFT's LoRA layer of a linear layer, whose ordinary call is one fused node (two for DoRA).

    It has PEFT's name and no state of its own: a PEFT layer becomes one, and ceases to be one, by
    its ``__class__``.  Calls that :mod:`.moment` and :mod:`.reading` don't allow are PEFT's.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = active_adapters(self)
        alone = self.disable_adapters or self.merged or not names  # the base layer's call
        if not (alone or args or kwargs or why_not_now()):
            seen = glance(self, names, x) if may_be_known(x) else None
            settings = None if seen is None else known(*seen)
            if seen is not None and settings is not None:
                return run(seen.inputs, settings)[0]
            reading = read(self, names)
            if reading.output is not None and fits(x, reading.output.base.weight):
                y = fast_forward(x, names[0], reading)
                if seen is not None:
                    _remember(seen, reading)
                return y
        return super().forward(x, *args, **kwargs)


def _remember(seen: Glance, reading: Reading) -> None:
    """That a call like this was ``lora_linears``' with what the glance saw, and nothing else."""
    assert reading.output is not None
    outputs = (reading.output,)
    tensors = flatten(outputs, layouts_of(outputs))
    same = len(tensors) == len(seen.inputs) - 1 and all(map(is_, tensors, seen.inputs[1:]))
    if same and reading.magnitude is None:
        settings = known(*key_of(seen.inputs[0], outputs, reading.p, True, None))
        if settings is not None:
            remember(*seen, settings)


def fast_forward(x: Tensor, name: str, reading: Reading) -> Tensor:
    """The output for x by fastlora's ops; ``name`` is that of the first active adapter."""
    assert reading.output is not None
    if reading.magnitude is None:
        return lora_linears(x, (reading.output,), dropout=reading.p)[0]
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


@dora.cache_decorator("weight-norm")  # kept as PEFT keeps it: in DoraCaching, in evaluation
def _norm(
    magnitude: dora.DoraLinearLayer, weight: Tensor, adapter: Adapter[Tensor], *, adapter_name: str
) -> Tensor:
    """The norms of the rows of a DoRA layer's weight."""
    return dora_norm(weight, *adapter)
