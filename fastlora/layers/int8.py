"""Int8Linear: a frozen linear layer whose weight has the format ``RotatedInt8``."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..call.projection import HALF_DTYPES, Base, Output
from ..formats import PackedLayer, weight_of
from ..formats.format import Quantized, name_of
from ..formats.packing import pack_weight
from ..formats.rotated_int8 import read
from ..ops.functional import lora_linears


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
        self.format = weight.format
        for name, tensor in zip(weight.format.names, weight.tensors, strict=True):
            self.register_buffer(name, tensor.detach().view(torch.uint8))

    @property
    def qweight(self) -> Tensor:
        """An empty tensor: PEFT gives a new adapter the device and dtype of ``qweight``."""
        return torch.empty(0, dtype=self.format.dtype, device=self.get_buffer("codes").device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # fn may be a cast.  Its result for an empty tensor shows the new dtype.
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


class AnyInputLinear(nn.Linear):
    """An ``nn.Linear`` for inputs of any dtype: it casts them, and casts the output back."""

    def forward(self, input: Tensor) -> Tensor:  # torch's name for the argument
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


def dense_linear(layer: Any, dtype: torch.dtype | None = None) -> nn.Linear:
    """An ``nn.Linear`` with the values of a packed layer, and a copy of its bias.

    ``dtype``: the dtype of its inputs, by default the one that the format records, or the 16-bit
    dtype of the layer's products or bias.  A layer without these becomes an ``AnyInputLinear`` in
    float32.  Raises ValueError if the weight can't be read.
    """
    packed = weight_of(layer)
    if not isinstance(packed, PackedLayer):
        raise ValueError(packed or f"a {type(layer).__name__} isn't packed")
    weight, bias = packed.weight, layer.bias
    if dtype is None and hasattr(weight.format, "compute"):
        dtype = weight.dtype
    beside = (packed.compute_dtype, getattr(bias, "dtype", None))
    dtype = dtype or next((each for each in beside if each in HALF_DTYPES), None)
    dense = weight.dense(dtype or torch.float32)
    kind = nn.Linear if dtype else AnyInputLinear
    # On meta, because its weight is replaced at once.
    made = kind(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=dense.dtype)
    made.weight = nn.Parameter(dense, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dense.dtype, copy=True), bias.requires_grad)
    return made.train(layer.training)
