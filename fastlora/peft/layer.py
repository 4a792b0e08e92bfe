"""What an optimised PEFT layer becomes: the same layer with another forward."""

from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor

from ..frozen import fits
from ..ops import dora_linear, dora_norm, lora_linears
from ..ops.few import few_rows, has_few_rows
from ..projection import Adapter
from .moment import why_not_now
from .reading import Reading, active_adapters, read


class Linear(PeftLinear):
    """PEFT's LoRA layer of a linear layer, whose ordinary call is one fused node (two for DoRA).

    It has PEFT's name and no state of its own: a PEFT layer becomes one, and ceases to be one, by
    its ``__class__``.  Calls that :mod:`.moment` and :mod:`.reading` don't allow are PEFT's.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = active_adapters(self)
        alone = self.disable_adapters or self.merged or not names  # the base layer's call
        if not (alone or args or kwargs or why_not_now()):
            reading = read(self, names)
            if reading.output is not None and fits(x, reading.output.base.weight):
                return fast_forward(x, names[0], reading)
        return super().forward(x, *args, **kwargs)


def fast_forward(x: Tensor, name: str, reading: Reading) -> Tensor:
    """The output for x by fastlora's ops; ``name`` is that of the first active adapter."""
    assert reading.output is not None
    if reading.magnitude is None:
        if not reading.p and has_few_rows(x, (reading.output,)):  # all else has been looked at
            return few_rows(x, (reading.output,))[0]
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
