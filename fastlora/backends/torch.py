"""The torch backend: torch's own products and in-place additions, on any device, in any dtype.

With x [M, K], weight [N, K], lora_a [r, K], lora_b [N, r] and the keep mask of dropout p:

    factor = scale / (1 - p)
    h  = factor · (mask ∘ x) lora_aᵀ            y  = x weightᵀ + h lora_bᵀ + bias
    dh = factor · dy lora_b                     dx = dy weight + mask ∘ (dh lora_a)
    d lora_a = dhᵀ (mask ∘ x)                   d lora_b = dyᵀ h

h and dh [M, r] carry the whole factor, which is applied while the product is still in the
accumulator.  So no matrix of size M·K or M·N is ever scaled.  :mod:`.formula` has the formulas over
some rows.

A call whose rows are cut into segments (rows.py) is a loop over *parts*: the segments that have
rows.  If the segments share a base, a part with the base and all rows of x comes first, and the
parts with one adapter each add to its results.  A part's rows are a view of x if they are
contiguous; otherwise they are copies that live until the next part.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.projection import Adapter, Base, Output, flatten, per_adapter, reads_x, unflatten
from ..call.rows import NO_BASE, Rows, take
from .dropout import DropoutMask
from .dropout import dropout_mask as dropout_mask
from .formula import Masks, OutputBackward, backward_rows, forward_rows, from_row
from .gated_products import gated as gated
from .gated_products import gated_backward as gated_backward
from .loss_of_rows import row_loss as row_loss
from .products import h_dtype as h_dtype
from .products import rows_of
from .protocol import BackwardCall, Call

HANDS_TO = ""  # no other backend, because this one covers every call


def why_not(dtype: torch.dtype, device: torch.device, outputs: Sequence[Output[Tensor]]) -> str:
    """Always "", because this backend covers every dtype and device."""
    return ""


def takes_experts_in_turn(device: torch.device) -> bool:
    """True on a CPU, which isn't faster with the rows of several experts at once."""
    return device.type == "cpu"


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """y [M, N] of every output; and a flat list of all h [M, r]."""
    x, *tensors = inputs
    outputs, rows = unflatten(tensors, call.layouts), call.rows
    if rows is None:
        return forward_rows(x, outputs, _masks(x.shape, outputs, seeds, call.dropout))
    ys = [x.new_empty(len(x), output.base.weight.shape[-2]) for output in outputs]
    widths, dtype = widths_of_h(outputs, rows.has_one_base), h_dtype(x.dtype, x.device)
    hs = [x.new_zeros(len(x), width, dtype=dtype) for width in widths]
    last = 0
    for part, x_rows, *into in _parts(outputs, seeds, call, x, x, *ys):
        # into: the part's rows of each y, as views, or as copies that put() writes back.
        _, thin = forward_rows(x_rows, part.outputs, part.masks, into, dtype)
        # Columns of h beyond an adapter's rank stay 0.  The part of a shared base has no h, so this
        # zip isn't strict.
        for h, of_part in zip(hs, thin, strict=False):
            h[part.place, : of_part.shape[1]] = of_part
        if part.rows is None:
            for y, y_rows in zip(ys, into, strict=True):
                part.put(y, y_rows)
        last = max(last, part.place.stop)
    # Rows after the last expert's belong to no expert.  With a shared base, last is len(x).
    for y in ys:
        y[last:].zero_()
    return ys, hs


def backward(given: BackwardCall) -> list[Tensor | None]:
    """The gradient of each input that needs one, else None."""
    dys, (x, *tensors), hs, needs, seeds, call = given
    outputs, wanted = unflatten(tensors, call.layouts), unflatten(needs[1:], call.layouts)
    dx, rows = x.new_empty(x.shape) if needs[0] else None, call.rows
    if rows is None:
        thin, masks = per_adapter(hs, outputs), _masks(x.shape, outputs, seeds, call.dropout)
        parts = [*map(OutputBackward, dys, outputs, thin, wanted, masks)]
        return [dx, *flatten(backward_rows(x, parts, dx), call.layouts)]
    gradients: list[Any] = [None] * len(tensors)
    are_many, last = rows.has_one_base, 0
    if not are_many:  # zeros, because experts without rows get a gradient of zeros
        pairs = zip(tensors, needs[1:], strict=True)
        gradients = [tensor.new_zeros(tensor.shape) if need else None for tensor, need in pairs]
    # The positions in ``tensors`` of a part's tensors: with experts all, with adapters its own.
    positions: Sequence[int] = range(len(tensors))
    all_positions = unflatten(positions, call.layouts) if are_many else []
    wants, dtype = wanted, h_dtype(x.dtype, x.device)
    matrices = x if reads_x(wanted) else None, dx, *dys
    for part, x_rows, dx_rows, *dy_rows in _parts(outputs, seeds, call, x, *matrices):
        if are_many:
            wants, positions = part.of(wanted), flatten(part.of(all_positions), call.layouts)
        last = max(last, part.place.stop)
        if x_rows is None:  # only the shape and dtype of x_rows are read, so a copy isn't needed
            x_rows = x[: part.place.stop - part.place.start]
        asked = [*map(OutputBackward, dy_rows, part.outputs, part.thin(hs), wants, part.masks)]
        adds = are_many and part.share is not None  # to dx, which the shared base has written
        of_part = backward_rows(x_rows, asked, dx_rows, float(adds), dtype)
        if part.rows is None and dx is not None:
            part.put(dx, dx_rows)
        for position, gradient in zip(positions, flatten(of_part, call.layouts), strict=True):
            if gradient is not None and are_many:
                gradients[position] = _widened(gradient, tensors[position])
            elif gradient is not None:
                # The stacked gradient is [E, …]; this is the part of expert e.
                gradients[position][part.share.segment].copy_(gradient)
    if dx is not None:
        dx[last:].zero_()
    return [dx, *gradients]


class _Part(NamedTuple):
    """Some rows, with the bases and adapters that they pass.

    An output without a base adds its product to y, which holds the result of an earlier part.
    """

    outputs: Sequence[Output[Tensor]]
    masks: Masks
    place: slice  # the part's rows of h
    rows: slice | None  # the part's rows of x, y and dy; None: they aren't contiguous
    share: Any  # a Share; None: all rows in their own order, in the part of the shared base
    items: int = 0  # the items in x: rows, or sequences, that have one adapter each

    def take(self, *matrices: Tensor | None) -> list[Any]:
        """The part's rows of each matrix: a view if they are contiguous, else a copy."""
        if self.rows is not None:
            return [rows_of(matrix, self.rows) for matrix in matrices]
        share, items = self.share, self.items
        return [None if matrix is None else take(matrix, share, items) for matrix in matrices]

    def put(self, matrix: Tensor, rows: Tensor) -> None:
        """Write rows that :meth:`take` copied, and that have changed, back to the matrix."""
        numbers: Any = self.share.items
        changed = rows.unflatten(0, (len(numbers), -1))
        matrix.unflatten(0, (self.items, -1)).index_copy_(0, numbers, changed)

    def of(self, outputs: Sequence[Output]) -> list[Output]:
        """The shared base of these outputs, or only this part's adapter of each."""
        if self.share is None:
            return [Output(output.base) for output in outputs]
        at = self.share.segment
        return [Output(NO_BASE, output.adapters[at : at + 1]) for output in outputs]

    def thin(self, hs: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """For each output, the part's rows of the h of each adapter."""
        left, thin = iter(hs), []
        for output in self.outputs:
            # The order matters: zip stops at the end of the adapters without taking another h.
            pairs = zip(output.adapters, left, strict=False)
            thin.append([h if h is None else h[self.place, : len(a.lora_a)] for a, h in pairs])
        return thin


def _parts(
    outputs: Sequence[Output[Tensor]],
    seeds: Tensor | None,
    call: Call,
    x: Tensor,
    *matrices: Tensor | None,
) -> Iterable[tuple[Any, ...]]:
    """Each part that has rows, with its rows of each matrix (:meth:`_Part.take`).

    A shared base is the first part.  Experts are a part each, and share one dropout mask.
    """
    rows = call.rows
    assert rows is not None
    if rows.order is not None:  # many adapters share a base
        adapters = _many_adapters(x, outputs, seeds, rows)
        return ((part, *part.take(*matrices)) for part in adapters)
    of_each, first = list(zip(*map(_apart, outputs), strict=True)), rows.first
    # of_each[e]: the outputs of expert e.  The masks begin at the call's row 0, x at its ``first``.
    masks = _masks((first + len(x), x.shape[1]), outputs, seeds, call.dropout)
    parts, sizes = [], []
    for share in rows.shares_of(len(x)) if len(x) else ():
        place = share.place
        own_masks = masks if seeds is None else from_row(masks, first + place.start)
        parts.append(_Part(of_each[share.segment], own_masks, place, place, share))
        sizes.append(place.stop - place.start)
    # The rows of experts follow each other, so one call of torch makes all views of a matrix.
    cut = [repeat(None) if m is None else m[: sum(sizes)].split(sizes) for m in matrices]
    return zip(parts, *cut, strict=False)


def _apart(output: Output[Tensor]) -> Iterator[Output[Tensor]]:
    """Yield the output of each expert: views of the stacked tensors."""
    (weight, bias), adapters = output
    bases = map(Base, weight.unbind(), repeat(None) if bias is None else bias.unbind())
    pairs = [map(Adapter, a.unbind(), b.unbind(), repeat(scale)) for a, b, scale in adapters]
    return map(Output, bases, zip(*pairs, strict=True) if pairs else repeat(()))


def _many_adapters(
    x: Tensor, outputs: Sequence[Output[Tensor]], seeds: Tensor | None, rows: Rows
) -> Iterator[_Part]:
    """The part of the shared base, and a part for each adapter.

    Each adapter has its own dropout probability, and a mask of its own rows.
    """
    alone, everything = [Output(output.base) for output in outputs], slice(0, len(x))
    yield _Part(alone, [[]] * len(alone), everything, everything, None)
    items = rows.items(len(x))
    per_item = len(x) // max(1, items)  # rows of an item
    assert rows.numbers is not None
    for share in rows.shares_of(len(x)) if per_item else ():
        at, place = share.segment, slice(share.place.start * per_item, share.place.stop * per_item)
        mask, p = None, 0.0 if seeds is None else rows.numbers.dropouts[at]
        if p and seeds is not None:
            shape = place.stop - place.start, x.shape[1]
            mask = DropoutMask(seeds[at : at + 1], shape, p)
        rows_of_x = None
        if isinstance(share.items, slice):
            rows_of_x = slice(share.items.start * per_item, share.items.stop * per_item)
        parts = [rows.part(output, at) for output in outputs]
        yield _Part(parts, [[mask]] * len(parts), place, rows_of_x, share, items)


def widths_of_h(outputs: Sequence[Output[Tensor]], one_each: bool) -> list[int]:
    """The number of columns of every h.

    ``one_each``: the adapters of an output share one h, as wide as the largest rank.
    """
    ranks = [[a.lora_a.shape[-2] for a in output.adapters] for output in outputs]
    return [max(of_one) for of_one in ranks] if one_each else [r for some in ranks for r in some]


def _widened(gradient: Tensor, tensor: Tensor) -> Tensor:
    """The gradient in the shape of the adapter's tensor, with zeros after the adapter's rank."""
    if gradient.shape == tensor.shape:
        return gradient
    rows, columns = gradient.shape
    whole = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    whole[:rows, :columns] = gradient
    return whole


def _masks(
    shape: Sequence[int], outputs: Sequence[Output[Tensor]], seeds: Tensor | None, p: float
) -> Masks:
    """For each output, a mask for each adapter; without dropout, None for each."""
    masks: list[list[DropoutMask | None]] = []
    seed_of_each, end = () if seeds is None else seeds.split(1), 0
    for _, adapters in outputs:
        first, end = end, end + len(adapters)
        if seeds is None:
            masks.append([None] * len(adapters))
        else:
            masks.append([DropoutMask(seed, shape, p) for seed in seed_of_each[first:end]])
    return masks
