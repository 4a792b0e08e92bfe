"""torchao's weight-only tensors, as the weight of a ``torch.nn.Linear``: integers and float8."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import derived_from, is_class
from ..formats.float8 import Float8
from ..formats.format import Quantised, name_of
from ..formats.integers import Affine, Int4Groups, Int8Rows
from ..projection import is_plain
from .vendor import Once, PackedLayer

_ZEROS = Once()

PARTS: tuple[str, ...] = ("weight",)


def owns(layer: nn.Module, kind: type[nn.Module]) -> bool:
    if getattr(kind, "forward", None) is not nn.Linear.forward:
        return False
    weight = layer._parameters.get("weight")
    if weight is None or is_plain(weight):  # whose class's bases torch.compile couldn't walk
        return False
    return derived_from(type(weight), "torchao", "TorchAOBaseTensor") is not None


def read(layer: nn.Module) -> PackedLayer | str:
    weight: Any = layer.weight
    name = type(weight).__name__
    kinds = {
        "Int8Tensor": _int8,
        "IntxUnpackedToInt8Tensor": _intx,
        "Int4Tensor": _int4,
        "Float8Tensor": _float8,
    }
    if not _is(weight, name) or name not in kinds:
        laid = ": its numbers lie as one kernel reads them" if name.startswith("Int4") else ""
        return f"its weight is torchao's {name}, which no format reads{laid}"
    if weight.dim() != 2:
        return f"its weight has shape {tuple(weight.shape)}"
    if getattr(weight, "act_pre_scale", None) is not None:
        return "its input is scaled before its weight is used (act_pre_scale)"
    try:
        quantised = kinds[name](weight)
        if not isinstance(quantised, str):
            quantised.format.check(quantised.tensors)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"its {name} is broken: {error}"
    return quantised if isinstance(quantised, str) else PackedLayer(quantised)


def pack(layer: nn.Module, weight: Tensor) -> None:
    theirs: Any = layer.weight
    kind: Any = type(theirs)
    settings: dict[str, Any] = {}
    if kind.__name__ == "Int4Tensor":
        raise ValueError(
            "torchao's Int4Tensor is read, and not made: leave the merged weight dense"
        )
    if kind.__name__ == "IntxUnpackedToInt8Tensor":
        mapping = sys.modules["torchao.quantization.quant_primitives"].MappingType
        settings["mapping_type"] = mapping.SYMMETRIC if _is_zero(theirs) else mapping.ASYMMETRIC
        settings |= {"block_size": tuple(theirs.block_size), "target_dtype": theirs.target_dtype}
    else:
        settings["granularity"] = _granularity(theirs)
    if kind.__name__ == "Float8Tensor":
        settings |= {"float8_dtype": theirs.qdata.dtype, "mm_config": theirs.mm_config}
        settings["kernel_preference"] = theirs.kernel_preference
    packed = kind.from_hp(weight.to(theirs.dtype), **settings)
    layer.weight = nn.Parameter(packed, requires_grad=False)


def _is(weight: Tensor, name: str) -> bool:
    return is_class(type(weight), "torchao.quantization", name)


def _int8(weight: Any) -> Quantised | str:
    if weight.act_quant_kwargs is not None:
        return _why_rounding("8 bits")
    return _whole_numbers(weight, 8)


def _intx(weight: Any) -> Quantised | str:
    if weight.activation_quantization is not None:
        return _why_rounding("8 bits")
    return _whole_numbers(weight, int(str(weight.target_dtype).removeprefix("torch.int")))


def _int4(weight: Any) -> Quantised | str:
    if weight.activation_dtype != torch.bfloat16:
        return _why_rounding("float8")
    rows, columns = weight.shape
    height, group = map(int, weight.block_size)
    if height != 1:
        return f"its groups are blocks of {(height, group)}"
    compute = name_of(weight.scale.dtype)
    tensors = (weight.qdata, weight.scale, weight.zero_point)
    return Quantised(Int4Groups(rows, columns, group, compute), tensors)


def _float8(weight: Any) -> Quantised | str:
    if weight.act_quant_kwargs is not None:
        return _why_rounding("float8")
    rows, columns = weight.shape
    height, width = map(int, weight.block_size or (rows, columns))
    code = name_of(weight.qdata.dtype)
    format = Float8(rows, columns, code, height, width)
    return Quantised(format, (weight.qdata, weight.scale.view(-(-rows // height), -1)))


def _why_rounding(what: str) -> str:
    return (
        f"its input is rounded to {what} in every call, through which torchao gives no gradient: "
        "what trains before it gets a wrong one"
    )


def _whole_numbers(weight: Any, bits: int) -> Quantised:
    rows, columns = weight.shape
    height, width = map(int, weight.block_size)
    shifted = weight.zero_point is not None and not _is_zero(weight)
    if not shifted and (height, width) == (1, columns):
        return Quantised(Int8Rows(rows, columns), (weight.qdata, weight.scale.view(rows)))
    tensors = (
        (weight.qdata, weight.scale, weight.zero_point) if shifted else (weight.qdata, weight.scale)
    )
    return Quantised(Affine(rows, columns, bits, height, width, shifted), tensors)


def _is_zero(weight: Any) -> bool:
    """Whether its zero point is 0 everywhere, as it is where a range is symmetric."""
    zero: Tensor | None = weight.zero_point
    return zero is None or _ZEROS.ask(zero, lambda zero: not bool(torch.any(zero)))


def _granularity(weight: Any) -> Any:
    made = sys.modules["torchao.quantization.granularity"]
    rows, columns = weight.shape
    block = tuple(weight.block_size or (rows, columns))
    if block == (rows, columns):
        return made.PerTensor()
    return made.PerRow() if block == (1, columns) else made.PerGroup(block[1])
