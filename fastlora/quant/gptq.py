"""GPTQ-Model's ``TorchLinear`` and ``TritonV2Linear``: GPTQ's checkpoints, as they are trained."""

from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import derived_from
from ..formats.format import Quantised, name_of
from ..formats.gptq import Gptq
from .vendor import Once, PackedLayer

_PACKAGE = "gptqmodel.nn_modules.qlinear"
# The others lay the numbers out for one kernel, or have other numbers.
_READ = ("TorchLinear", "TritonV2Linear")
_ORDERED = Once()

PARTS: tuple[str, ...] = ("qweight",)


def owns(layer: nn.Module, kind: type[nn.Module]) -> bool:
    theirs = _theirs(kind)
    return theirs is not None and kind.forward is theirs.forward


def read(layer: nn.Module) -> PackedLayer | str:
    theirs: Any = layer
    kind = _theirs(type(layer))
    if kind is None or kind.__name__ not in _READ:
        return "its numbers lie as its kernel reads them: GPTQConfig(backend='auto_trainable')"
    if theirs.planar or theirs.pack_dtype != torch.int32:
        return "its numbers lie in planes, or in other words than int32"
    if theirs.adapter is not None:
        return "it has an adapter of GPTQ-Model's"
    if theirs.online_full_had or theirs.online_partial_had:
        return "its input is rotated (Hadamard) before its weight is used"
    try:
        rows, columns, scales = theirs.out_features, theirs.in_features, theirs.scales
        groups = len(scales)
        compute = name_of(scales.dtype)
        ordered = _ORDERED.ask(theirs.g_idx, lambda g_idx: _is_ordered(g_idx, groups))
        format = Gptq(rows, columns, theirs.bits, groups, compute, ordered)
        tensors = tuple(t.detach() for t in (theirs.qweight, theirs.qzeros, scales, theirs.g_idx))
        format.check(tensors)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"its quantisation state is broken: {error}"
    return PackedLayer(Quantised(format, tensors))


def pack(layer: nn.Module, weight: Tensor) -> None:
    raise ValueError("GPTQ's numbers are read, and not made: its rounding needs data")


def _theirs(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of GPTQ-Model's that this one is, or derives from."""
    if derived_from(kind, _PACKAGE, "GPTQQuantLinear") is None:
        return None
    return next(base for base in kind.__mro__ if base.__module__.startswith(_PACKAGE))


def _is_ordered(g_idx: Tensor, groups: int) -> bool:
    """Whether the columns are groups of one size, one after another."""
    if len(g_idx) % groups:
        return False
    columns = torch.arange(len(g_idx), dtype=g_idx.dtype, device=g_idx.device)
    return torch.equal(g_idx, columns // (len(g_idx) // groups))
