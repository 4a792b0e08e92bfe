"""Dense weights that are stored in 16 bits and used in x's dtype: Unsloth's layers on a CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..common.other_packages import is_class
from .format import FLOATS, Expected, Format, Quantized
from .vendor import PackedLayer, checked


@dataclass(frozen=True)
class Stored(Format):
    """weight [rows, columns], dense, cast to out's dtype."""

    label: ClassVar[str] = "stored in 16 bits"

    def expected(self) -> Expected:
        return {"weight": ((self.rows, self.columns), FLOATS)}

    def read(self, tensors: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
        return out.copy_(tensors[0][first : first + len(out)])


# Unsloth's layer, a torch.nn.Linear with another forward.


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    return is_class(kind, "unsloth_zoo.cpu.ops", "Bf16StoredLinear")


@checked("its weight is")
def read(layer: Any) -> PackedLayer | str:
    weight = layer.weight
    if weight.requires_grad:
        return "its weight trains"
    return PackedLayer(Quantized(Stored(*weight.shape), (weight.detach(),)))
