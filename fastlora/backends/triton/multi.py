"""Many adapters over one base by the Triton kernels: the adapters are segments of sorted rows.

The base product is a layer's without adapters, of all rows as they lie.  On top come the low-rank
parts, whose tiles look up where their rows lie in x, dy, y and dx: nothing is gathered.  Adapters
of unlike ranks are padded to the largest; of a bank nothing is copied.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...mapping import Mix, Sorted
from ...projection import Adapter, Output, flatten, layouts_of, unflatten
from .. import torch as torch_backend
from ..protocol import Settings
from . import layer
from .cover import covers, current, kernels, precision_of


def forward_multi(
    x: Tensor,
    output: Output[Tensor],
    batch: Sorted,
    mix: Mix,
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As the torch backend's: y [M, N], and h [M, the largest r] in the sorted order."""
    with current(x.device):
        if not _covers(x, output):
            return torch_backend.forward_multi(x, output, batch, mix, seeds)
        (y,), _ = layer.forward(*_base_call(x, output))
        width, places = _width(output), _places(x, batch)
        if not places.rows:
            return y, x.new_zeros(len(x), width)
        lora_a, lora_b = _banks(output, batch, mix)
        tensors = [*_shared(places, batch, mix, seeds), places.of(x), places.of(y), lora_a, lora_b]
        made = kernels.replayed(_forward, tensors, (precision_of(x),), lambda: True)
        assert made is not None
        (h,) = made
        assert h is not None
        if len(h) < len(x):
            h = torch.cat([h, h.new_zeros(len(x) - len(h), width)])
        return y, h


def backward_multi(
    dy: Tensor,
    x: Tensor,
    output: Output[Tensor],
    batch: Sorted,
    mix: Mix,
    h: Tensor,
    needs_x: bool,
    wanted: Output[bool],
    seeds: Tensor | None,
) -> tuple[Tensor | None, Output[Tensor | None]]:
    """As the torch backend's: dx, if it is needed, and the gradients as wanted."""
    with current(x.device):
        if not _covers(x, output, dy):
            return torch_backend.backward_multi(
                dy, x, output, batch, mix, h, needs_x, wanted, seeds
            )
        inputs, _, settings = _base_call(x, output)
        base_needs = [needs_x, *flatten([Output(wanted.base)], settings.layouts)]
        dx, *flat = layer.backward([dy], inputs, [], base_needs, None, settings)
        ((of_base, _),) = unflatten(flat, settings.layouts)
        places, own = _places(x, batch), [share.adapter for share in batch.shares]
        needs = [wanted.adapters[i] for i in own]
        need = Adapter(any([n.lora_a for n in needs]), any([n.lora_b for n in needs]))
        gradients: list[Adapter[Tensor | None]] = [Adapter(None, None) for _ in output.adapters]
        if places.rows and (needs_x or need.lora_a or need.lora_b):
            lora_a, lora_b = _banks(output, batch, mix)
            tensors = [
                *_shared(places, batch, mix, seeds), places.of(x), places.of(dy),
                None if dx is None else places.of(dx), lora_a, lora_b,
                h[: places.rows] if need.lora_b else None,
            ]  # fmt: skip
            settings_of = (precision_of(x), need.lora_a, need.lora_b)
            made = kernels.replayed(_backward, tensors, settings_of, lambda: True)
            assert made is not None
            for place, i in enumerate(own):
                gradients[i] = _cut(made, place, output.adapters[i], wanted.adapters[i])
    return dx, Output(of_base, tuple(gradients))


def _forward(tensors: Sequence[Tensor], precision: str) -> list[Tensor]:
    """h; and what it gives is added to y."""
    seeds, ends, order, *own, x, y, lora_a, lora_b = tensors
    shared = {"precision": precision, "ends": ends, "order": order, "own": kernels.Own(*own)}
    (h,) = kernels.project(x, [lora_a.mT], [1.0], seeds=seeds, **shared)
    kernels.lowrank(y, [h], [lora_b.mT], add=True, **shared)
    return [h]


def _backward(
    tensors: Sequence[Tensor], precision: str, needs_a: bool, needs_b: bool
) -> list[Tensor | None]:
    """The gradients of both banks; and what dh gives is added to dx, if it is there."""
    seeds, ends, order, *own, x, dy, dx, lora_a, lora_b, h = tensors
    shared = {"precision": precision, "ends": ends, "order": order, "own": kernels.Own(*own)}
    d_lora_a = torch.empty_like(lora_a, memory_format=torch.contiguous_format) if needs_a else None
    d_lora_b = torch.empty_like(lora_b, memory_format=torch.contiguous_format) if needs_b else None
    needs_dh, dh = dx is not None or needs_a, None
    if d_lora_b is not None:
        at_once = needs_dh and kernels.one_pass_pays(dy[: len(h)], lora_b, precision)
        # A hook on saved tensors may give h back in another layout.
        thin, b = h if h.is_contiguous() else h.contiguous(), lora_b if at_once else None
        dh = kernels.weight_grad(dy, [thin], [d_lora_b], b=b, **shared)
    if needs_dh and dh is None:
        (dh,) = kernels.project(dy, [lora_b], [1.0], **shared)
    if dh is not None and dx is not None:
        kernels.lowrank(dx, [dh], [lora_a], add=True, seeds=seeds, **shared)
    if dh is not None and d_lora_a is not None:
        kernels.weight_grad(x, [dh], [d_lora_a.mT], seeds=seeds, **shared)
    return [d_lora_a, d_lora_b]


class _Places(NamedTuple):
    """Where the rows of the adapters lie."""

    rows: int  # how many there are
    first: int  # of x, if they lie there in their order
    ends: Tensor  # int32 [adapters with rows]
    order: Tensor | None  # int32 [rows]: where each is, if they lie in another order

    def of(self, matrix: Tensor) -> Tensor:
        """The part of x, y … that kernels get."""
        if self.order is not None:
            return matrix
        return matrix[self.first : self.first + self.rows]


def _places(x: Tensor, batch: Sorted) -> _Places:
    """Kept for all layers, and for the backward."""
    rows = len(x) // max(1, len(batch.order))  # of an item
    key = ("triton places", rows, x.device)
    if key not in batch.kept:
        batch.kept[key] = _new_places(x, batch, rows)
    return batch.kept[key]


def _new_places(x: Tensor, batch: Sorted, rows: int) -> _Places:
    ends = [share.place.stop * rows for share in batch.shares]
    count = ends[-1] if ends else 0
    there = torch.tensor(ends, dtype=torch.int32, device=x.device)
    shifts = {
        share.items.start - share.place.start if isinstance(share.items, slice) else None
        for share in batch.shares
    }
    (shift, *others) = shifts or {0}
    if shift is not None and not others:
        return _Places(count, shift * rows, there, None)
    items = batch.order[: batch.shares[-1].place.stop].to(x.device, torch.int32)
    numbers = torch.arange(rows, dtype=torch.int32, device=x.device)
    return _Places(count, 0, there, (items.unsqueeze(1) * rows + numbers).flatten())


def _shared(places: _Places, batch: Sorted, mix: Mix, seeds: Tensor | None) -> list[Tensor | None]:
    """What all kernels of a call take: seeds, ends, order, and each adapter's own numbers."""
    own = [share.adapter for share in batch.shares]
    numbers = [(mix.scales[i], 0.0 if seeds is None else mix.dropouts[i]) for i in own]
    if seeds is not None and len(own) < len(seeds):
        seeds = torch.cat([seeds[i : i + 1] for i in own])
    return [seeds, places.ends, places.order, *_own(tuple(numbers), places.ends.device)]


@lru_cache(maxsize=256)  # all layers of a model have the same, or a few kinds
def _own(numbers: tuple[tuple[float, float], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    factors = torch.tensor([scale / (1.0 - p) for scale, p in numbers], dtype=torch.float32)
    thresholds = [kernels.dropout_threshold(p) for _, p in numbers]
    return factors.to(device), torch.tensor(thresholds, dtype=torch.int32, device=device)


def _banks(output: Output[Tensor], batch: Sorted, mix: Mix) -> tuple[Tensor, Tensor]:
    """lora_a [n, r, K] and lora_b [n, N, r] of the adapters with rows; zeros behind a rank."""
    width = _width(output)
    pairs = [(output.adapters[s.adapter], mix.ranks[s.adapter]) for s in batch.shares]
    features, out_features = pairs[0][0].lora_a.shape[1], pairs[0][0].lora_b.shape[0]
    lora_a = _bank([adapter.lora_a[:rank] for adapter, rank in pairs], (width, features))
    lora_b = _bank([adapter.lora_b[:, :rank] for adapter, rank in pairs], (out_features, width))
    return lora_a, lora_b


def _bank(parts: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """These [rows, columns] in one tensor [n, *shape]; of one that they are views of, itself."""
    first, whole = parts[0], all([part.shape == shape for part in parts])
    if whole and 1 in first.stride() and _lie_evenly(parts):
        step = parts[1].storage_offset() - first.storage_offset() if len(parts) > 1 else 0
        return first.as_strided((len(parts), *shape), (step, *first.stride()))
    if whole:
        return torch.stack([part.contiguous() for part in parts])
    dtype = first.dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    bank = first.new_zeros(len(parts), *shape, dtype=dtype)
    places = [bank[i, : len(p), : p.shape[1]] for i, p in enumerate(parts)]
    torch._foreach_copy_(places, list(parts))
    return bank


def _lie_evenly(parts: Sequence[Tensor]) -> bool:
    """Whether they lie in one memory, alike, and each as far behind the one before it."""
    kinds = {(part.untyped_storage().data_ptr(), part.stride(), part.dtype) for part in parts}
    steps = {b.storage_offset() - a.storage_offset() for a, b in pairwise(parts)}
    return len(kinds) == 1 and len(steps) <= 1 and min(steps, default=0) >= 0


def _cut(
    made: Sequence[Tensor | None], place: int, adapter: Adapter[Tensor], need: Adapter[bool]
) -> Adapter[Tensor | None]:
    """One adapter's gradients of the banks', in its tensors' shapes and dtypes."""
    d_lora_a, d_lora_b = made
    own_a = own_b = None
    if d_lora_a is not None and need.lora_a:
        own_a = d_lora_a[place, : len(adapter.lora_a)].to(adapter.lora_a.dtype)
    if d_lora_b is not None and need.lora_b:
        own_b = d_lora_b[place, :, : adapter.lora_b.shape[1]].to(adapter.lora_b.dtype).contiguous()
    return Adapter(own_a, own_b)


def _base_call(x: Tensor, output: Output[Tensor]) -> tuple[list[Tensor], None, Settings]:
    """The layer without adapters: inputs, no seeds, and settings."""
    alone = [Output(output.base)]
    layouts = layouts_of(alone)
    # The settings' backend is what ops ask; in here nobody does.
    return [x, *flatten(alone, layouts)], None, Settings(layouts, 0.0, torch_backend)


def _width(output: Output[Tensor]) -> int:
    return max([len(adapter.lora_a) for adapter in output.adapters])


def _covers(x: Tensor, output: Output[Tensor], *dys: Tensor) -> bool:
    layouts = layouts_of([output])
    return covers([x, *flatten([output], layouts)], layouts, dys)
