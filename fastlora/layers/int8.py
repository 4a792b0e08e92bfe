"""Int8Linear: a frozen linear layer whose weight has the format ``RotatedInt8``."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.format import Quantized, name_of
from ..formats.packing import pack_weight
from ..formats.rotated_int8 import read
from ..ops.functional import lora_linears
from ..projection import Base, Output


class Int8Linear(nn.Module):
    """x weightᵀ + bias, like ``nn.Linear``, in 8 bits.  x may have any floating dtype.

    ``codes`` [N, K] and ``scale`` [4 N] hold the bits of the format's tensors as uint8, because a
    cast of the model (``model.half()``) skips integers.  A cast only changes the dtype that
    ``format`` has for dense weights (merges, ``restore``).  ``weight`` is None, so that code which
    reads it fails.
    """

    def __init__(self, weight: Quantized, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_parameter("weight", None)
        self.register_parameter("bias", bias)
        self.hold(weight)

    def hold(self, weight: Quantized) -> None:
        """Replace the weight."""
        self.format = weight.format
        for name, tensor in zip(weight.format.names, weight.tensors, strict=True):
            self.register_buffer(name, tensor.detach().view(torch.uint8))

    @property
    def qweight(self) -> Tensor:
        """An empty tensor: PEFT gives a new adapter the device and dtype of ``qweight``."""
        return torch.empty(0, dtype=self.format.dtype, device=self.get_buffer("codes").device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        dtype = fn(torch.empty(0, dtype=self.format.dtype, device="cpu")).dtype
        self.format = replace(self.format, compute=name_of(dtype))
        return self

    def forward(self, input: Tensor) -> Tensor:  # torch's name for the argument
        packed: Any = read(self)
        return lora_linears(input, (Output(Base(packed.weight, self.bias)),))[0]

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


def int8_linear(linear: Any) -> Int8Linear:
    """An ``Int8Linear`` with the rounded weight of an ``nn.Linear``, and its bias.

    Raises the errors of :func:`pack_weight`.
    """
    weight = pack_weight(linear.weight.detach(), "int8")
    return Int8Linear(weight, linear.bias).train(linear.training)


def dense_linear(layer: Any) -> nn.Linear:
    """An ``nn.Linear`` with the values and the bias of an ``Int8Linear``, in its dtype."""
    packed: Any = read(layer)
    weight = packed.weight
    sizes = layer.in_features, layer.out_features
    dense = nn.Linear(*sizes, bias=False, device="meta", dtype=weight.dtype)
    dense.weight = nn.Parameter(weight.dense(weight.dtype), requires_grad=False)
    dense.bias = layer.bias
    return dense.train(layer.training)
