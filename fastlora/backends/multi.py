"""Many adapters over one base, each with rows of its own, by torch's operations on any device.

The base product is that of all rows, as they lie.  The formulas of an adapter (:mod:`.rows`) run
over its own rows: a view of x, y, dy and dx where these lie together, else copies that live until
the next adapter.  So an adapter's mask is one of its own rows, whatever else is in the batch, and
no sum goes over rows of two adapters.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..mapping import Mix, Share, Sorted
from ..projection import Adapter, Output
from .dropout import DropoutMask
from .products import h_dtype
from .rows import adapter_gradients, add_adapter, backward_rows, forward_rows


class _Part(NamedTuple):
    """An adapter that has rows: a view of it, which ends at its rank."""

    share: Share
    adapter: Adapter[Tensor]
    rank: int
    rows: int
    place: slice  # of h's rows
    mask: DropoutMask | None


def forward_multi(
    x: Tensor, output: Output[Tensor], batch: Sorted, mix: Mix, seeds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [M, N] of x [M, K], and h [M, the largest r] in the sorted order."""
    items = len(batch.order)
    (y,), _ = forward_rows(x, [Output(output.base)], [[]])
    width = max([adapter.lora_a.shape[0] for adapter in output.adapters])
    h = x.new_zeros(len(x), width, dtype=h_dtype(x.dtype, x.device))
    for part in _parts(x, output, batch, mix, seeds):
        y_rows = _take(y, part, items)
        found = add_adapter(y_rows, _take(x, part, items), part.adapter, part.mask)
        h[part.place, : part.rank] = found
        _put(y, y_rows, part, items)
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
    """dx, if it is needed, and the gradients as wanted; None for an adapter without rows."""
    items = len(batch.order)
    alone, need = [Output(output.base)], [Output(wanted.base)]
    dx, (of_base,) = backward_rows([dy], x, alone, [[]], need, [[]], needs_x)
    gradients: list[Adapter[Tensor | None]] = [Adapter(None, None) for _ in output.adapters]
    for part in _parts(x, output, batch, mix, seeds):
        wants = wanted.adapters[part.share.adapter]
        if dx is None and not (wants.lora_a or wants.lora_b):
            continue
        # Where lora_a needs no gradient, x is looked at for its shape and dtype alone.
        x_rows = _take(x, part, items) if wants.lora_a else x[: part.rows]
        dx_rows = None if dx is None else _take(dx, part, items)
        h_rows = h[part.place, : part.rank] if wants.lora_b else h[part.place]
        found = adapter_gradients(
            _take(dy, part, items), x_rows, part.adapter, wants, h_rows, part.mask, dx_rows
        )
        if dx is not None and dx_rows is not None:
            _put(dx, dx_rows, part, items)
        gradients[part.share.adapter] = _widened(found, output.adapters[part.share.adapter])
    return dx, Output(of_base.base, tuple(gradients))


def _parts(
    x: Tensor, output: Output[Tensor], batch: Sorted, mix: Mix, seeds: Tensor | None
) -> Iterator[_Part]:
    rows = len(x) // max(1, len(batch.order))  # of an item
    if not rows:
        return
    for share in batch.shares:
        i, place = share.adapter, slice(share.place.start * rows, share.place.stop * rows)
        lora_a, lora_b, _ = output.adapters[i]
        rank, p, count = mix.ranks[i], mix.dropouts[i], place.stop - place.start
        mask = None
        if seeds is not None and p:
            mask = DropoutMask(seeds[i : i + 1], (count, x.shape[1]), p)
        adapter = Adapter(lora_a[:rank], lora_b[:, :rank], mix.scales[i])
        yield _Part(share, adapter, rank, count, place, mask)


def _take(matrix: Tensor, part: _Part, items: int) -> Tensor:
    """The adapter's rows, [count, columns]."""
    own = part.share.items
    if isinstance(own, slice):
        rows = len(matrix) // items
        return matrix[own.start * rows : own.stop * rows]
    return matrix.unflatten(0, (items, -1)).index_select(0, own).flatten(0, 1)


def _put(matrix: Tensor, rows: Tensor, part: _Part, items: int) -> None:
    """The adapter's rows, changed since they were taken, back where they lay."""
    own = part.share.items
    if not isinstance(own, slice):
        matrix.unflatten(0, (items, -1)).index_copy_(0, own, rows.unflatten(0, (len(own), -1)))


def _widened(found: Adapter[Tensor | None], adapter: Adapter[Tensor]) -> Adapter[Tensor | None]:
    """The gradients in the shapes of the adapter's tensors: zeros behind its rank."""
    d_lora_a, d_lora_b, _ = found
    if d_lora_a is not None and d_lora_a.shape != adapter.lora_a.shape:
        filled = torch.zeros_like(adapter.lora_a, memory_format=torch.contiguous_format)
        filled[: len(d_lora_a)] = d_lora_a
        d_lora_a = filled
    if d_lora_b is not None and d_lora_b.shape != adapter.lora_b.shape:
        filled = torch.zeros_like(adapter.lora_b, memory_format=torch.contiguous_format)
        filled[:, : d_lora_b.shape[1]] = d_lora_b
        d_lora_b = filled
    return Adapter(d_lora_a, d_lora_b)
