"""GPTQ-Model's layers of GPTQ and of AWQ."""

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..common.other_packages import derived_from, is_class
from .format import Quantized, name_of
from .opaque import Opaque
from .vendor import PackedLayer, checked

_LAYERS = "gptqmodel.nn_modules.qlinear"
_AWQ = "gptqmodel.quantization.awq.utils.packing_utils"
# Other classes arrange codes for one kernel, or hold other kinds of codes.
_READ = ("TorchLinear", "TritonV2Linear")
_READ_AWQ = ("AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear")


class GPTQ(Opaque):
    """qweight, qzeros, scales and g_idx of a ``TorchLinear``, with zeros of version 2."""

    names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def values(self, *tensors: Tensor) -> Tensor:
        sizes = {"in_features": self.columns, "out_features": self.rows, "bits": self.bits}
        layer = sys.modules[f"{_LAYERS}.torch"].TorchLinear(
            **sizes, group_size=self.group, sym=False, desc_act=True, register_buffers=False
        )
        for name, tensor in zip(self.names, tensors, strict=True):
            layer.register_buffer(name, tensor)
        return layer.dequantize_weight().T


class AWQ(Opaque):
    """qweight, qzeros and scales of an ``AwqTorchLinear``."""

    label: ClassVar[str] = "AWQ"
    names: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def values(self, *tensors: Tensor) -> Tensor:
        return sys.modules[_AWQ].dequantize_gemm(*tensors, self.bits, self.group).T


def owns(layer: Any, kind: type[nn.Module]) -> bool:
    theirs = _theirs(kind)
    return _is_awq(kind) or (theirs is not None and kind.forward is theirs.forward)


@checked("its quantization state is")
def read(layer: Any) -> PackedLayer | str:
    if layer.adapter is not None:
        return "it has an adapter of GPTQ-Model's"
    if _is_awq(type(layer)):
        weight = _weight_of(layer, AWQ, layer.in_features // len(layer.scales))
        return PackedLayer(weight, rounds_input=True)  # its own forward rounds x to 16 bits
    kind = _theirs(type(layer))
    if kind is None or kind.__name__ not in _READ:
        return "its numbers lie as its kernel reads them: GPTQConfig(backend='auto_trainable')"
    if layer.planar or layer.pack_dtype != torch.int32:
        return "its numbers lie in planes, or in other words than int32"
    if layer.online_full_had or layer.online_partial_had:
        return "its input is rotated (Hadamard) before its weight is used"
    return PackedLayer(_weight_of(layer, GPTQ, layer.group_size))


def _weight_of(layer: Any, kind: type[Opaque], group: int) -> Quantized:
    tensors = tuple([getattr(layer, name).detach() for name in kind.names])
    compute = name_of(layer.scales.dtype)
    return Quantized(
        kind(layer.out_features, layer.in_features, layer.bits, group, compute), tensors
    )


def _is_awq(kind: type[nn.Module]) -> bool:
    return any(is_class(kind, _LAYERS, name) for name in _READ_AWQ)


def _theirs(kind: type[nn.Module]) -> type[nn.Module] | None:
    """GPTQ-Model's class that ``kind`` is or derives from; None: ``kind`` has no such base."""
    if derived_from(kind, _LAYERS, "GPTQQuantLinear") is None:
        return None
    return next(base for base in kind.__mro__ if base.__module__.startswith(_LAYERS))
