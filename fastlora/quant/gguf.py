"""transformers' ``GgufLinear`` and ``GgufExperts``, whose weights are the blocks of a GGUF file."""

from typing import Any

from torch import Tensor, nn

from ..foreign import is_class
from ..formats.format import Quantised
from ..formats.gguf import Gguf
from .vendor import PackedLayer

_MODULE = "transformers.integrations.gguf.utils"
# ggml's number of each type.
_KINDS = {
    2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    20: "IQ4_NL", 23: "IQ4_XS",
}  # fmt: skip

PARTS: tuple[str, ...] = ("weight",)


def owns(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return is_class(kind, _MODULE, "GgufLinear")


def read(layer: nn.Module) -> PackedLayer | str:
    theirs: Any = layer
    kind = _KINDS.get(theirs.ggml_type)
    if kind is None:
        return f"its GGUF type has number {theirs.ggml_type}, which no format reads"
    order = theirs.input_permutation
    format = Gguf(theirs.out_features, theirs.in_features, kind, order is not None)
    tensors = (theirs.weight.detach(),) if order is None else (theirs.weight.detach(), order)
    try:
        format.check(tensors)
    except ValueError as error:
        return f"its blocks are broken: {error}"
    return PackedLayer(Quantised(format, tensors))


def is_experts(kind: type[nn.Module]) -> bool:
    return is_class(kind, _MODULE, "GgufExperts")


def experts_weight(experts: nn.Module, name: str) -> Quantised | str:
    """A weight of ``GgufExperts`` as a stack [E, N, K], of its own memory; or why it can't be."""
    theirs: Any = experts
    is_down, packed = name == "down_proj", getattr(theirs, name).detach()
    number = theirs.down_type if is_down else theirs.gate_up_type
    if number not in _KINDS:
        return f"the GGUF type of its {name} has number {number}, which no format reads"
    columns = theirs.intermediate_dim if is_down else theirs.hidden_dim
    weight = Quantised(Gguf(packed.shape[1], columns, _KINDS[number]), (packed,))
    try:
        weight.check()
    except ValueError as error:
        return f"its {name} is broken: {error}"
    return weight


def pack(layer: nn.Module, weight: Tensor) -> None:
    raise ValueError("GGUF's blocks are read, and not made: leave the merged weight dense")
