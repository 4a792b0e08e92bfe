"""Many adapters over one base, by the Triton kernels.

First, a layer without adapters computes the base product of all rows, in their own order.  Then the
kernels add each adapter's part to the rows that have the adapter.

Inside of the kernels (``kernels/segments.py``), a tile finds its adapter's tensors and the places
of its rows in x, dy, y and dx.  So no rows are gathered, and the host reads no index.  Adapters of
several ranks are copied to one tensor, padded to the largest rank.  Adapters of equal shapes that
already are slices of one tensor (a bank) aren't copied.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...call.projection import Adapter, Base, Output, unflatten
from ...call.rows import NO_BASE, Rows
from .. import torch as torch_backend
from ..dropout import DropoutMask
from ..formula import OutputBackward, backward_rows, forward_rows
from ..protocol import BackwardCall, Call
from . import linear as layer
from .linear import through_lora_b
from .supported import covers, empty_gradients, kernels, precision_of
from .verification import KernelFunction, run_kernels


def forward(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """Every output's y and h, as the torch backend returns them; here one of each."""
    (x, *flat), rows = inputs, call.rows
    assert rows is not None
    if len(call.layouts) > 1 or not covers(inputs, call.layouts):
        return torch_backend.forward(inputs, seeds, call)
    (output,) = unflatten(flat, call.layouts)
    count, base_call = _base_call(inputs, call)
    # inputs[:count]: x and the base's tensors.  The adapters' tensors follow.
    (y,), _ = layer.forward(inputs[:count], None, base_call)
    width, places = _width(output), _places(x, rows)
    # No row has an adapter.
    if not places.rows:
        return [y], [x.new_zeros(len(x), width)]
    lora_a, lora_b = _banks(output, rows)
    tensors = [places.of(x), places.of(y), lora_a, lora_b, *_shared(places, rows, seeds)]
    (h,) = run_kernels(_ADDED, tensors, (precision_of(x),))
    if len(h) < len(x):  # h has the sorted rows; rows without an adapter follow, as zeros
        h = torch.cat([h, h.new_zeros(len(x) - len(h), width)])
    return [y], [h]


def backward(given: BackwardCall) -> list[Tensor | None]:
    """The gradient of each input that needs one, else None, as the torch backend returns them."""
    (dy, *_), inputs, (h, *_), needs, seeds, call = given
    (x, *flat), rows = inputs, call.rows
    assert rows is not None
    if dy is None or len(call.layouts) > 1 or not covers([*inputs, dy], call.layouts):
        return torch_backend.backward(given)
    (output,), (wanted,) = unflatten(flat, call.layouts), unflatten(needs[1:], call.layouts)
    # First the layer without adapters, then the adapters' part of dx is added to it.
    count, base_call = _base_call(inputs, call)
    base = layer.backward(BackwardCall([dy], inputs[:count], [], needs[:count], None, base_call))
    dx = base[0]
    places, segments = _places(x, rows), [share.segment for share in rows.shares or []]
    used = [wanted.adapters[i] for i in segments]
    # The kernels compute the gradients of whole banks, so one adapter's need computes all.
    need = Adapter(any([n.lora_a for n in used]), any([n.lora_b for n in used]))
    gradients: list[Tensor | None] = [None] * (len(inputs) - count)
    if places.rows and (needs[0] or need.lora_a or need.lora_b):
        lora_a, lora_b = _banks(output, rows)
        tensors = [
            places.of(x), None if dx is None else places.of(dx), lora_a, lora_b, places.of(dy),
            h[: places.rows] if need.lora_b and h is not None else None,
            *_shared(places, rows, seeds),
        ]  # fmt: skip
        settings = precision_of(x), need.lora_a, need.lora_b
        of_banks = run_kernels(_ADDED_BACKWARD, tensors, settings)
        for place, i in enumerate(segments):
            # place: the adapter's place in the banks, which have only adapters with rows.
            own = _cut(of_banks, place, output.adapters[i], wanted.adapters[i])
            gradients[2 * i : 2 * i + 2] = own
    return [*base, *gradients]


def _added(tensors: Sequence[Tensor], precision: str) -> list[Tensor]:
    """Return h [rows, r], and add h lora_bᵀ to y in place."""
    # numbers: each segment's factor and dropout threshold, [segments].
    x, y, lora_a, lora_b, seeds, ends, order, *numbers = tensors
    of_each = kernels.SegmentNumbers(*numbers)
    shared = {"precision": precision, "ends": ends, "order": order, "numbers": of_each}
    # The factor 1.0 isn't used: each segment has its own.
    (h,) = kernels.project(x, [lora_a.mT], [1.0], seeds=seeds, **shared)
    kernels.lowrank(y, [h], [lora_b.mT], add=True, **shared)
    return [h]


def _added_backward(
    tensors: Sequence[Tensor], precision: str, needs_a: bool, needs_b: bool
) -> list[Tensor | None]:
    """Return the gradients of both banks, and add mask ∘ (dh lora_a) to dx, unless dx is None."""
    x, dx, lora_a, lora_b, dy, h, seeds, ends, order, *numbers = tensors
    of_each = kernels.SegmentNumbers(*numbers)
    shared = {"precision": precision, "ends": ends, "order": order, "numbers": of_each}
    needs = Adapter(needs_a, needs_b)
    d_lora_a, d_lora_b, _ = empty_gradients(Adapter(lora_a, lora_b), needs)
    dh = through_lora_b(dy, lora_b, h, d_lora_b, 1.0, dx is not None or needs_a, shared)
    if dh is not None and dx is not None:
        kernels.lowrank(dx, [dh], [lora_a], add=True, seeds=seeds, **shared)
    if dh is not None and d_lora_a is not None:
        kernels.weight_grad(x, [dh], [d_lora_a.mT], seeds=seeds, **shared)
    return [d_lora_a, d_lora_b]


def _added_by_torch(tensors: Sequence[Tensor], _: str) -> list[Tensor]:
    """:func:`_added` by the torch backend's formulas, one segment after another."""
    x, y, lora_a, lora_b, *shared = tensors
    hs = []
    for at, rows, factor, mask in _segments(x, *shared):
        output, y_rows = Output(NO_BASE, (Adapter(lora_a[at], lora_b[at], factor),)), y[rows]
        hs += forward_rows(x[rows], [output], [[mask]], [y_rows])[1]
        # Without an order y_rows is a view, but with one it is a copy.
        y[rows] = y_rows
    return [torch.cat(hs)]


def _added_backward_by_torch(
    tensors: Sequence[Tensor], _: str, needs_a: bool, needs_b: bool
) -> list[Tensor | None]:
    x, dx, lora_a, lora_b, dy, h, *shared = tensors
    wanted, gradients, first = Output(Base(False), (Adapter(needs_a, needs_b),)), [], 0
    for at, rows, factor, mask in _segments(x, *shared):
        output, x_rows = Output(NO_BASE, (Adapter(lora_a[at], lora_b[at], factor),)), x[rows]
        # h has the rows in sorted order, where the segments follow each other.
        h_rows = None if h is None else h[first : first + len(x_rows)]
        dx_rows = None if dx is None else dx[rows]
        part = OutputBackward(dy[rows], output, [h_rows], wanted, [mask])
        gradients.append(backward_rows(x_rows, [part], dx_rows, beta=1.0)[0].adapters[0][:2])
        if dx is not None:
            dx[rows] = dx_rows
        first += len(x_rows)
    return [
        None if of_all[0] is None else torch.stack(of_all)
        for of_all in zip(*gradients, strict=True)
    ]


def _segments(
    x: Tensor,
    seeds: Tensor | None,
    ends: Tensor,
    order: Tensor | None,
    factors: Tensor,
    thresholds: Tensor,
) -> Iterator[tuple[int, Any, float, DropoutMask | None]]:
    """Yield each segment's number, its rows of x, its factor, and its dropout mask."""
    first = 0
    for at, (end, factor, least) in enumerate(
        zip(*map(Tensor.tolist, (ends, factors, thresholds)), strict=True)
    ):
        rows, mask = slice(first, end) if order is None else order[first:end].long(), None
        if seeds is not None:
            # p 0 here, because the factor includes 1 / (1 - p).  A threshold is mask.least · 2¹⁶.
            mask = DropoutMask(seeds[at : at + 1], (end - first, x.shape[1]), 0.0)
            mask.least = least >> 16
        yield at, rows, factor, mask
        first = end


def _covers(*_: object) -> bool:
    """All calls, because :func:`covers` was asked before."""
    return True


# writes: the place of y, or dx, in the list of tensors.
_ADDED = KernelFunction(_added, _added_by_torch, _covers, writes=(1,))
_ADDED_BACKWARD = KernelFunction(_added_backward, _added_backward_by_torch, _covers, writes=(1,))


class _Places(NamedTuple):
    """The places in x of the rows that have an adapter."""

    rows: int  # their number
    first: int  # their first row in x, if they are sorted and consecutive there
    ends: Tensor  # int32 [adapters with rows]
    order: Tensor | None  # int32 [rows]: their rows in x, if they aren't sorted there

    def of(self, matrix: Tensor) -> Tensor:
        """The part of x, y, dy or dx that the kernels receive."""
        if self.order is not None:
            return matrix
        return matrix[self.first : self.first + self.rows]


def _places(x: Tensor, rows: Rows) -> _Places:
    """The places of a call's rows, cached in ``rows.memo`` for all layers and for the backward."""
    per_item = len(x) // max(1, rows.items(len(x)))  # rows of an item
    memo = {} if rows.memo is None else rows.memo
    key = ("triton places", per_item, x.device)
    if key not in memo:
        memo[key] = _new_places(x, rows, per_item)
    return memo[key]


def _new_places(x: Tensor, rows: Rows, per_item: int) -> _Places:
    # An item (a row or a sequence of x) has ``per_item`` rows; shares count items.
    shares = rows.shares or []
    ends = [share.place.stop * per_item for share in shares]
    count = ends[-1] if ends else 0
    ends_in_rows = torch.tensor(ends, dtype=torch.int32, device=x.device)
    shifts = {
        share.items.start - share.place.start if isinstance(share.items, slice) else None
        for share in shares
    }
    # shift: first item in x - first place in sorted order; None if a share's items are no slice.
    (shift, *others) = shifts or {0}
    # All shares are slices with the same shift: x is sorted, so a slice of x suffices.
    if shift is not None and not others:
        return _Places(count, shift * per_item, ends_in_rows, None)
    assert rows.order is not None
    items = rows.order[: shares[-1].place.stop].to(x.device, torch.int32)
    numbers = torch.arange(per_item, dtype=torch.int32, device=x.device)
    return _Places(count, 0, ends_in_rows, (items.unsqueeze(1) * per_item + numbers).flatten())


def _shared(places: _Places, rows: Rows, seeds: Tensor | None) -> list[Tensor | None]:
    """Arguments that all kernels of a call share: seeds, ends, order, factors, thresholds."""
    assert rows.numbers is not None
    segments, (scales, _, dropouts) = [share.segment for share in rows.shares or []], rows.numbers
    numbers = [(scales[i], 0.0 if seeds is None else dropouts[i]) for i in segments]
    if seeds is not None and len(segments) < len(seeds):  # drop seeds of adapters without rows
        seeds = torch.cat([seeds[i : i + 1] for i in segments])
    return [seeds, places.ends, places.order, *_on_device(tuple(numbers), places.ends.device)]


@lru_cache(maxsize=256)  # the layers of a model share a few sets of numbers
def _on_device(
    numbers: tuple[tuple[float, float], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    factors = [scale / (1.0 - p) for scale, p in numbers]
    thresholds = [kernels.dropout_threshold(p) for _, p in numbers]
    return (
        torch.tensor(factors, dtype=torch.float32, device=device),
        torch.tensor(thresholds, dtype=torch.int32, device=device),
    )


def _banks(output: Output[Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
    """lora_a [n, r, K] and lora_b [n, N, r] of the adapters with rows, padded with zeros to r."""
    width = _width(output)
    pairs = [rows.part(output, share.segment).adapters[0] for share in rows.shares or []]
    features, out_features = pairs[0].lora_a.shape[1], pairs[0].lora_b.shape[0]
    lora_a = _bank([adapter.lora_a for adapter in pairs], (width, features))
    lora_b = _bank([adapter.lora_b for adapter in pairs], (out_features, width))
    return lora_a, lora_b


def _bank(parts: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Matrices [rows, columns] as one tensor [n, *shape]: a view if they already are one tensor."""
    first, whole = parts[0], all([part.shape == shape for part in parts])
    if whole and 1 in first.stride() and _lie_evenly(parts):
        # The view begins where ``first`` does.  Its first stride is the distance between parts.
        step = parts[1].storage_offset() - first.storage_offset() if len(parts) > 1 else 0
        return first.as_strided((len(parts), *shape), (step, *first.stride()))
    if whole:
        return torch.stack([part.contiguous() for part in parts])
    # Unlike shapes: copy into zeros, in a dtype that holds all parts.
    dtype = reduce(torch.promote_types, [part.dtype for part in parts])
    bank = first.new_zeros(len(parts), *shape, dtype=dtype)
    places = [bank[i, : len(p), : p.shape[1]] for i, p in enumerate(parts)]
    torch._foreach_copy_(places, list(parts))
    return bank


def _lie_evenly(parts: Sequence[Tensor]) -> bool:
    """Whether the parts share a storage, strides and dtype, and follow at equal distances."""
    kinds = {(part.untyped_storage().data_ptr(), part.stride(), part.dtype) for part in parts}
    steps = {b.storage_offset() - a.storage_offset() for a, b in pairwise(parts)}
    # as_strided takes no negative stride.
    return len(kinds) == 1 and len(steps) <= 1 and min(steps, default=0) >= 0


def _cut(
    of_banks: Sequence[Tensor | None], place: int, adapter: Adapter[Tensor], need: Adapter[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """One adapter's gradients, cut out of the banks' gradients, in its own shapes and dtypes."""
    # [n, r, K] and [n, N, r], with the largest r
    d_lora_a, d_lora_b = of_banks
    own_a = own_b = None
    if d_lora_a is not None and need.lora_a:
        own_a = d_lora_a[place, : len(adapter.lora_a)].to(adapter.lora_a.dtype)
    if d_lora_b is not None and need.lora_b:
        own_b = d_lora_b[place, :, : adapter.lora_b.shape[1]].to(adapter.lora_b.dtype).contiguous()
    return own_a, own_b


def _base_call(inputs: Sequence[Tensor], call: Call) -> tuple[int, Call]:
    """The layer without adapters: how many of the inputs it takes, and its call."""
    (layout,) = call.layouts
    alone = call._replace(layouts=(layout._replace(scales=()),), dropout=0.0, rows=None)
    return len(inputs) - 2 * len(layout.scales), alone


def _width(output: Output[Tensor]) -> int:
    return max([len(adapter.lora_a) for adapter in output.adapters])
