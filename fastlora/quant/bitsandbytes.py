"""bitsandbytes' ``Linear4bit`` (NF4, FP4) and ``Linear8bitLt`` (LLM.int8)."""

import sys
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import derived_from, is_dtensor
from ..formats.format import Quantised
from ..formats.four_bit import FourBit
from ..formats.integers import Int8Rows
from .vendor import PackedLayer

_MODULES = "bitsandbytes.nn.modules"
_REPACKS = "support_avx512bf16_for_cpu"
# 1 / 127 is what the library multiplies SCB by, in float32.
_FACTOR = 1.0 / 127.0

PARTS: tuple[str, ...] = ("weight", "quant_state", "state")  # the one or the other


def owns(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Theirs, or one of the same forward: LinearNF4, LinearFP4."""
    four_bit, int8 = (derived_from(kind, _MODULES, n) for n in ("Linear4bit", "Linear8bitLt"))
    theirs: Any = four_bit or int8
    if theirs is None or kind.forward is not theirs.forward:
        return False
    return kind.__call__ is nn.Module.__call__


def read(layer: nn.Module) -> PackedLayer | str:
    try:
        packed = _read_int8(layer) if hasattr(layer, "state") else _read_four_bit(layer)
        if isinstance(packed, PackedLayer) and packed.is_whole:
            packed.weight.format.check(packed.weight.tensors)
        return packed
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"its quantisation state is broken: {error}"


def pack(layer: nn.Module, weight: Tensor) -> None:
    theirs: Any = layer
    kind, device = type(theirs.weight), theirs.weight.device
    if hasattr(layer, "state"):
        theirs.weight = kind(weight.half().cpu(), requires_grad=False).to(device)
        theirs.state = copy(theirs.state)
        theirs.state.CB = theirs.state.SCB = None  # the layer takes them from its weight, again
        return
    state = _state_of(layer)
    made = kind(
        weight.to(state.dtype).cpu(),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=theirs.weight.dtype,
    )
    theirs.weight = made.to(device)
    theirs.quant_state = theirs.weight.quant_state


def keep_gradients(layer: nn.Module) -> None:
    """Let a frozen Linear4bit give x its gradient after a call in evaluation, too.

    On a CPU with AVX512-BF16 such a call lays the weight anew, for a kernel without gradients, and
    rounds its absmax to bfloat16.
    """
    theirs: Any = layer
    if hasattr(layer, _REPACKS) and derived_from(type(layer), _MODULES, "Linear4bit"):
        setattr(layer, _REPACKS, False)
        if getattr(_state_of(theirs), "packing_format_for_cpu", False):
            back = sys.modules[_MODULES]._convert_weight_packed_for_cpu_inverse
            weight = theirs.weight
            weight.data, weight.quant_state = back(weight.data, _state_of(theirs))
            theirs.quant_state = weight.quant_state


def repack_again(layer: nn.Module) -> None:
    """What it was before :func:`keep_gradients`."""
    if hasattr(layer, _REPACKS) and derived_from(type(layer), _MODULES, "Linear4bit"):
        setattr(layer, _REPACKS, sys.modules[_MODULES].has_avx512bf16())


def before_loading(layer: nn.Module) -> None:
    """Let a Linear8bitLt that has been called take the SCB of a state dict: its weight has it."""
    theirs: Any = layer
    if derived_from(type(layer), _MODULES, "Linear8bitLt") and theirs.state.SCB is not None:
        theirs.weight.SCB = theirs.state.SCB


def _state_of(layer: Any) -> Any:
    """The weight's state; FSDP may have made the weight anew, and then the layer still has it."""
    state = getattr(layer.weight, "quant_state", None)
    return state if state is not None else layer.quant_state


def _read_four_bit(layer: Any) -> PackedLayer | str:
    state, weight = _state_of(layer), layer.weight
    if state is None:
        return "its weight isn't quantised as yet: .to(device) does that"
    if getattr(state, "packing_format_for_cpu", False):
        # Its kernel knows no gradient.  A layer with an adapter of its weight has no other call.
        if torch.is_grad_enabled() or hasattr(layer, "lora_A"):
            return _read_repacked(layer, state)
        return "its weight is repacked for bitsandbytes' own CPU kernel, by a call in evaluation"
    # FSDP has made a weight anew that doesn't know, and bytes it doesn't cast.
    storage = getattr(weight, "quant_storage", None) or getattr(
        layer, "quant_storage", weight.dtype
    )
    if storage.is_floating_point and weight.dtype != storage:
        return (
            f"its packed numbers, stored as {storage}, were cast to {weight.dtype}: make "
            "bnb_4bit_quant_storage the dtype that FSDP's mixed precision casts to"
        )
    rows, columns = state.shape
    if (rows, columns) != (layer.out_features, layer.in_features):
        return f"its quantisation state is of a weight of shape {tuple(state.shape)}"
    packed = weight.detach()
    if not is_dtensor(weight):  # FSDP's between calls, which nothing reads
        packed = packed.view(torch.uint8).view(-1)
    tensors: tuple[Tensor, ...] = (packed, state.absmax)
    nested = 0
    if state.nested:
        outer = state.state2
        nested = outer.blocksize
        tensors = (*tensors, outer.absmax, outer.code, state.offset)
    format = FourBit(rows, columns, state.quant_type, state.blocksize, nested)
    return PackedLayer(Quantised(format, tensors), layer.compute_dtype, restores=True)


def _read_repacked(layer: Any, state: Any) -> PackedLayer:
    """The weight that a call in evaluation has laid as bitsandbytes' CPU kernel reads it.

    A byte has, for 32 rows and two columns, the numbers of row b and row b + 16 in one column;
    absmax is bfloat16 [blocks of a row, rows].  Copies of both are made.
    """
    rows, columns = state.shape
    laid = layer.weight.detach().view(rows // 32, columns // 2, 1, 16, 2)
    numbers = torch.cat([laid & 15, laid >> 4], 2)
    pairs = numbers[..., 0] << 4 | numbers[..., 1]
    packed = pairs.permute(0, 2, 3, 1).reshape(-1)
    absmax = state.absmax.t().reshape(-1).float()
    format = FourBit(rows, columns, state.quant_type, state.blocksize)
    return PackedLayer(Quantised(format, (packed, absmax)), layer.compute_dtype, restores=True)


def _read_int8(layer: Any) -> PackedLayer | str:
    state = layer.state
    if state.has_fp16_weights:
        return "its weight has 16 bits, and is quantised in every call (has_fp16_weights)"
    if state.threshold:
        return (
            f"its outlier threshold is {state.threshold}: which columns of x it rounds to 8 bits "
            "depends on their values; 0 is read"
        )
    if state.SCB is None and not hasattr(layer.weight, "SCB"):
        return "its weight was made anew without its scales (FSDP2 does that)"
    codes, scale = _codes_and_scale(layer)
    if scale is None or codes.dtype != torch.int8:
        return "its weight isn't quantised as yet: .to(device) does that"
    rows, columns = codes.shape
    weight = Quantised(Int8Rows(rows, columns, _FACTOR), (codes, scale))
    return PackedLayer(weight, rounds_input=True)


def _codes_and_scale(layer: Any) -> tuple[Tensor, Tensor | None]:
    """CB and SCB, which the layer's first call moves from the weight to its state.

    A model's move to another device leaves the state's behind.
    """
    weight, state = layer.weight, layer.state
    codes = weight.CB if weight.CB is not None else state.CB
    codes = weight.detach() if codes is None else codes.detach()
    scale = weight.SCB if weight.SCB is not None else state.SCB
    return codes.to(weight.device), None if scale is None else scale.to(weight.device)
