"""The torch backend: any device and floating dtype, by torch's own products and in-place adds.

With x [M, K], weight [N, K], lora_a [r, K], lora_b [N, r] and the keep mask of dropout p:

    factor = scale / (1 - p)
    h  = factor · (mask ∘ x) lora_aᵀ            y  = x weightᵀ + h lora_bᵀ + bias
    dh = factor · dy lora_b                     dx = dy weight + mask ∘ (dh lora_a)
    d lora_a = dhᵀ (mask ∘ x)                   d lora_b = dyᵀ h

h and dh [M, r] carry the whole factor, multiplied in while the product is still in the accumulator,
so that nothing of size M·K or M·N is ever scaled.  The formulas over some rows are in
:mod:`.formula`.

A call whose rows are cut into segments is a loop over the parts that have rows.  Where segments
share a base, that is the first part, of all rows as they lie; the others add to what it made.  A
part's rows are a view where they lie together, else copies that live until the next part.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..projection import Adapter, Output, flatten, per_adapter, unflatten
from ..rows import NO_BASE, Share, put, take
from .dropout import DropoutMask, dropout_mask
from .formula import Masks, backward_rows, base_gradients, forward_rows, no_gradients
from .gated import gated, gated_backward
from .products import h_dtype
from .protocol import Call

__all__ = [
    "backward",
    "base_gradients",
    "dropout_mask",
    "forward",
    "gated",
    "gated_backward",
    "h_dtype",
    "no_gradients",
    "takes_experts_in_turn",
    "why_not",
]


def why_not(dtype: torch.dtype, device: torch.device, outputs: Sequence[Output[Tensor]]) -> str:
    """Why a call with x of this dtype and device isn't covered; it always is."""
    return ""


def takes_experts_in_turn(device: torch.device) -> bool:
    """On a CPU, where nothing is won by more rows than those of an expert."""
    return device.type == "cpu"


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """y [M, N] of every output, and every h [M, r], laid end to end."""
    x, *tensors = inputs
    outputs, rows = unflatten(tensors, call.layouts), call.rows
    if rows is None:
        return forward_rows(x, outputs, _masks(x, outputs, seeds, call.dropout))
    ys = [x.new_empty(len(x), output.base.weight.shape[-2]) for output in outputs]
    dtype = h_dtype(x.dtype, x.device)
    hs = [
        x.new_zeros(len(x), width, dtype=dtype) for width in widths_of_h(outputs, rows.shares_base)
    ]
    items, last = rows.items(len(x)), 0
    for part in _parts(x, outputs, seeds, call):
        into = [part.take(y, items) for y in ys]
        _, found = forward_rows(part.take(x, items), part.outputs, part.masks, into)
        for h, of_part in zip(hs, found, strict=False):
            h[part.place, : of_part.shape[1]] = of_part
        for y, y_rows in zip(ys, into, strict=True):
            part.put(y, y_rows, items)
        last = max(last, part.place.stop)
    for y in ys:
        y[last:].zero_()
    return ys, hs


def backward(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    needs: Sequence[bool],
    seeds: Tensor | None,
    call: Call,
) -> list[Tensor | None]:
    """The gradient of each input that needs one, else None."""
    x, *tensors = inputs
    outputs, wanted = unflatten(tensors, call.layouts), unflatten(needs[1:], call.layouts)
    dx, rows = x.new_empty(x.shape) if needs[0] else None, call.rows
    if rows is None:
        masks, thin = _masks(x, outputs, seeds, call.dropout), list(per_adapter(hs, outputs))
        gradients = backward_rows(dys, x, outputs, thin, wanted, masks, dx)
        return [dx, *flatten(gradients, call.layouts)]
    total = _Gradients(outputs, wanted, call)
    items, last = rows.items(len(x)), 0
    for part in _parts(x, outputs, seeds, call):
        wants = [part.of(each) for each in wanted]
        last = max(last, part.place.stop)
        if dx is None and not any(map(_wants, wants)):
            continue
        # Where nothing reads x, it is looked at for its shape and dtype alone.
        reads_x = any(base.weight or any([a.lora_a for a in own]) for base, own in wants)
        count = part.place.stop - part.place.start
        dx_rows = None if dx is None else part.take(dx, items)
        found = backward_rows(
            [None if dy is None else part.take(dy, items) for dy in dys],
            part.take(x, items) if reads_x else x[:count],
            part.outputs,
            part.thin(hs),
            wants,
            part.masks,
            dx_rows,
        )
        if dx is not None and dx_rows is not None:
            part.put(dx, dx_rows, items)
        total.add(part, found)
    if dx is not None:
        dx[last:].zero_()
    return [dx, *total.flat(rows.shares_base)]


class _Part(NamedTuple):
    """Some rows, and what they go through; a base of None adds to what is there already."""

    share: Share | None  # None: all rows as they lie, through the base that all segments share
    place: slice  # of the rows of h
    outputs: list[Output[Tensor]]
    masks: Masks
    shares_base: bool

    def take(self, matrix: Tensor, items: int) -> Tensor:
        return matrix if self.share is None else take(matrix, self.share, items)

    def put(self, matrix: Tensor, rows: Tensor, items: int) -> None:
        if self.share is not None:
            put(matrix, rows, self.share, items)

    def of(self, whole: Output) -> Output:
        """What this part has of an output that stands for all tensors: for what is wanted."""
        if not self.shares_base:
            return whole
        if self.share is None:
            return Output(whole.base)
        return Output(NO_BASE, whole.adapters[self.share.segment :][:1])

    def thin(self, hs: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """The part's rows of every h, for each output."""
        left = iter(hs)
        return [
            [
                None if h is None else h[self.place, : adapter.lora_a.shape[0]]
                for adapter, h in zip(output.adapters, left, strict=False)
            ]
            for output in self.outputs
        ]


class _Gradients:
    """Of all tensors, from each part's: None for one of many adapters that has no rows."""

    def __init__(
        self, outputs: Sequence[Output[Tensor]], wanted: Sequence[Output[bool]], call: Call
    ) -> None:
        self.outputs, self.layouts = outputs, call.layouts
        self.bases = [no_gradients(output).base for output in outputs]
        self.adapters = [[*no_gradients(output).adapters] for output in outputs]
        pairs = zip(flatten(outputs, call.layouts), flatten(wanted, call.layouts), strict=True)
        # Zeros, for experts without rows.
        are_stacked = call.rows is not None and not call.rows.shares_base
        self.stacked = [t.new_zeros(t.shape) if need and are_stacked else None for t, need in pairs]
        self.places = [None if stack is None else stack.unbind() for stack in self.stacked]

    def add(self, part: _Part, found: Sequence[Output[Tensor | None]]) -> None:
        if part.share is None:
            self.bases = [own.base for own in found]
        elif part.shares_base:
            at = part.share.segment
            for of_one, own, output in zip(self.adapters, found, self.outputs, strict=True):
                of_one[at] = _widened(own.adapters[0], output.adapters[at])
        else:
            for places, gradient in zip(self.places, flatten(found, self.layouts), strict=True):
                if places is not None and gradient is not None:
                    places[part.share.segment].copy_(gradient)

    def flat(self, shares_base: bool) -> list[Tensor | None]:
        if not shares_base:
            return self.stacked
        pairs = zip(self.bases, self.adapters, strict=True)
        return flatten([Output(base, tuple(own)) for base, own in pairs], self.layouts)


def _parts(
    x: Tensor, outputs: Sequence[Output[Tensor]], seeds: Tensor | None, call: Call
) -> Iterator[_Part]:
    """Those that have rows; the shared base first."""
    rows, p = call.rows, call.dropout
    assert rows is not None
    if rows.shares_base:
        alone = [Output(output.base) for output in outputs]
        yield _Part(None, slice(0, len(x)), alone, [[]] * len(alone), True)
    each = len(x) // max(1, rows.items(len(x)))  # rows of an item
    whole, stacks = None, []
    if rows.own is None:  # what is stacked is taken apart at once, and all rows have one mask
        stacks = [tensor.unbind() for tensor in flatten(outputs, call.layouts)]
        shape = rows.first + len(x), x.shape[1]
        if seeds is not None:
            whole = [DropoutMask(seed.view(1), shape, p) for seed in seeds.unbind()]
    for share in rows.found(len(x)) if each else ():
        at, place = share.segment, slice(share.place.start * each, share.place.stop * each)
        if rows.own is None:
            parts = unflatten([stack[at] for stack in stacks], call.layouts)
        else:
            parts = [rows.part(output, at) for output in outputs]
        masks: Masks = [[None] * len(part.adapters) for part in parts]
        if whole is not None:
            masks = list(per_adapter([m.from_row(rows.first + place.start) for m in whole], parts))
        elif seeds is not None and rows.own is not None and rows.own.dropouts[at]:
            own_shape = place.stop - place.start, x.shape[1]
            mask = DropoutMask(seeds[at : at + 1], own_shape, rows.own.dropouts[at])
            masks = [[mask] for _ in parts]
        yield _Part(share, place, parts, masks, rows.shares_base)


def widths_of_h(outputs: Sequence[Output[Tensor]], one_each: bool) -> list[int]:
    """The columns of every h: many adapters of an output share one, as wide as the widest."""
    ranks = [[a.lora_a.shape[-2] for a in output.adapters] for output in outputs]
    return [max(of_one) for of_one in ranks] if one_each else [r for some in ranks for r in some]


def _widened(found: Adapter[Tensor | None], adapter: Adapter[Tensor]) -> Adapter[Tensor | None]:
    """The gradients in the shapes of the adapter's tensors: zeros behind its rank."""
    made = []
    for gradient, tensor in zip(found[:2], adapter[:2], strict=True):
        if gradient is not None and gradient.shape != tensor.shape:
            rows, columns = gradient.shape
            whole = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            whole[:rows, :columns] = gradient
            gradient = whole
        made.append(gradient)
    d_lora_a, d_lora_b = made
    return Adapter(d_lora_a, d_lora_b)


def _masks(x: Tensor, outputs: Sequence[Output[Tensor]], seeds: Tensor | None, p: float) -> Masks:
    """For each output its adapters' masks, or None for each without dropout."""
    if seeds is None:
        return [[None] * len(output.adapters) for output in outputs]
    made = [DropoutMask(seed.view(1), x.shape, p) for seed in seeds.unbind()]
    return list(per_adapter(made, outputs))


def _wants(wanted: Output[bool]) -> bool:
    (weight, bias), adapters = wanted
    return bool(weight or bias or any([a.lora_a or a.lora_b for a in adapters]))
