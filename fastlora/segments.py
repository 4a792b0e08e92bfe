"""Segments: rows sorted by what they belong to, here by expert, and where each one's rows end."""

from typing import NamedTuple

import torch
from torch import Tensor

from .formats.format import Quantised
from .projection import (
    Adapter,
    Base,
    Output,
    check_dropout,
    check_scale,
    check_switch,
    check_tensor,
    check_tensors,
    check_weight_dtype,
    check_x,
    is_plain,
    shown,
    why_not_mixed,
)


class Segments(NamedTuple):
    """Sorted rows, cut into E segments, any of which may be empty.

    ``ends`` int32 [E], on the rows' device: the number of the row behind each segment's last, as in
    ``torch.nn.functional.grouped_mm``.  Rows behind the last end are nobody's.  ``first``: how many
    rows of the call lie before these, for a mask of dropout.
    """

    ends: Tensor
    first: int = 0

    def slices(self, rows: int) -> list[slice]:
        """Each segment's rows, of so many, on the host: on a GPU it waits for ``ends``.

        Raises ValueError for ends that decrease, or lie beyond the rows.
        """
        ends = self.ends.tolist()
        starts = [0, *ends[:-1]]
        if any(not start <= end <= rows for start, end in zip(starts, ends, strict=True)):
            raise ValueError(
                f"offsets are {shown(ends)}, but must be the ends of the experts' rows: none below "
                f"the one before it, and none above {rows}, the rows of x"
            )
        return [slice(start, end) for start, end in zip(starts, ends, strict=True)]

    def of_rows(self, rows: int) -> Tensor:
        """The segment of each of so many rows, int64, on the device; E for nobody's."""
        numbers = torch.arange(rows, dtype=torch.int32, device=self.ends.device)
        return torch.searchsorted(self.ends.contiguous(), numbers, right=True)


def parts_of(output: Output[Tensor]) -> list[Output[Tensor]]:
    """Each segment's own output, of one whose tensors are stacked: views, with a dimension less."""
    (weight, bias), adapters = output
    weights = weight.unbind()
    biases = [None] * len(weights) if bias is None else bias.unbind()
    banks = [(lora_a.unbind(), lora_b.unbind(), scale) for lora_a, lora_b, scale in adapters]
    return [
        Output(
            Base(weights[e], biases[e]),
            tuple([Adapter(lora_a[e], lora_b[e], scale) for lora_a, lora_b, scale in banks]),
        )
        for e in range(len(weights))
    ]


def check_grouped(
    x: Tensor,
    output: Output[Tensor],
    segments: Segments,
    dropout: float,
    training: bool,
    autocast: bool,
) -> None:
    """Raise ValueError or TypeError unless the stacked tensors of an output fit x, a tensor.

    ``autocast``: x and the weight will be cast, and needn't agree.
    """
    check_x(x)
    if x.is_nested:
        raise TypeError("x is nested, but must be [rows, in_features]: give it as one matrix")
    if x.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but must be [rows, in_features], sorted by expert"
        )
    check_dropout(dropout)
    check_switch("training", training)
    if isinstance(output.base.weight, Quantised):
        raise TypeError("weight is packed, but experts' must be plain tensors: dequantise it")
    check_tensors(x, x.device, output)
    check_weight_dtype(output.base.weight, x.dtype, autocast)
    _check_shapes(x.shape[1], output)
    for adapter in output.adapters:
        check_scale(adapter.scale)
    _check_ends(x, len(output.base.weight), segments.ends)


def _check_shapes(features: int, output: Output[Tensor]) -> None:
    (weight, bias), adapters = output
    shape = weight.shape
    if len(shape) != 3 or shape[2] != features or 0 in shape:
        raise ValueError(
            f"weight has shape {tuple(shape)}, but x has {features} features: weight must be "
            f"[experts, out_features, {features}], each at least 1"
        )
    experts, out_features, _ = shape
    if bias is not None and bias.shape != shape[:2]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, but weight is that of {experts} experts with "
            f"{out_features} rows each: bias must be [{experts}, {out_features}]"
        )
    for lora_a, lora_b, _ in adapters:
        shape = lora_a.shape
        if len(shape) != 3 or shape[0] != experts or shape[1] == 0 or shape[2] != features:
            raise ValueError(
                f"lora_a has shape {tuple(shape)}, but there are {experts} experts, and x has "
                f"{features} features: lora_a must be [{experts}, r, {features}], r at least 1"
            )
        expected = (experts, out_features, shape[1])
        if lora_b.shape != expected:
            raise ValueError(
                f"lora_b has shape {tuple(lora_b.shape)}, but weight and lora_a have "
                f"{tuple(output.base.weight.shape)} and {tuple(shape)}: lora_b must be "
                f"{list(expected)}"
            )


def _check_ends(x: Tensor, experts: int, ends: Tensor) -> None:
    if not is_plain(ends):
        check_tensor("offsets", ends)
        if type(ends).__name__ == "FakeTensor" and is_plain(x):
            raise TypeError(why_not_mixed("offsets", ends, x))
    if ends.dtype != torch.int32 or ends.layout is not torch.strided or ends.is_nested:
        raise TypeError(
            f"offsets has dtype {ends.dtype} and layout {ends.layout}, but must be dense and "
            "int32, as for torch.nn.functional.grouped_mm: call offsets.to(torch.int32)"
        )
    if ends.shape != (experts,):
        raise ValueError(
            f"offsets has shape {tuple(ends.shape)}, but there are {experts} experts: offsets must "
            f"be [{experts}], the end of each one's rows"
        )
    if ends.device != x.device:
        raise ValueError(
            f"offsets is on {ends.device}, but x is on {x.device}: move them to one device"
        )
