"""Which adapter each item of a batch belongs to: sorted once, and shared by all layers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .projection import Layout, is_plain, shown


class Share(NamedTuple):
    """One adapter's items of a batch."""

    adapter: int
    items: slice | Tensor  # where they lie together a slice, else their numbers, ascending
    place: slice  # in the sorted order


class Sorted(NamedTuple):
    """The items of a batch, sorted by adapter, as all layers on one device share them."""

    order: Tensor  # int64 [items]: their numbers; behind those with an adapter come the others
    shares: list[Share]  # of the adapters that have items, in order
    kept: dict  # what a backend made of it


class AdapterMapping:
    """Which adapter each item of a batch belongs to.  All layers, forward and backward, share it.

    ``adapter_indices``: int32, of x's first dimensions or of all but the last, so that an item is a
    sequence or a row; a list is one number a sequence.  -1 is for no adapter.  ``adapters``: how
    many there are.  Later changes of ``adapter_indices`` change nothing.

    Where ``adapter_indices`` is on a GPU, the first call waits for it, and no other one does.

    Raises TypeError for what is no such tensor, and ValueError for ``adapters`` below 1 and for
    numbers beyond them: on a CPU at once, on a GPU in the first call.
    """

    def __init__(self, adapter_indices: Tensor | Sequence[int], adapters: int) -> None:
        indices = as_indices(adapter_indices)
        if type(adapters) is not int or not 1 <= adapters < 2**31:  # indices are int32
            raise ValueError(
                f"adapters is {shown(adapters)}, but must be a whole number from 1 on, below 2³¹"
            )
        self.adapters, self.shape = adapters, tuple(indices.shape)
        self.order, self.ends = sort_items(indices, adapters)
        self._sorted: dict[torch.device, Sorted] = {}
        if indices.device.type == "cpu" and is_plain(indices) and not is_compiling():
            self.on(indices.device)

    def on(self, device: torch.device) -> Sorted:
        """For layers on this device."""
        if device not in self._sorted:
            self._sorted[device] = sorted_on(self.order, self.ends, device)
        return self._sorted[device]


def as_indices(indices: Tensor | Sequence[int]) -> Tensor:
    """A tensor of them.  Raises TypeError for what can't say which adapter an item belongs to."""
    if not isinstance(indices, Tensor):
        try:
            found = torch.tensor(indices, device="cpu")
            if found.numel() and found.dtype != torch.int64:
                raise TypeError
            return found.to(torch.int32)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"adapter_indices is {shown(indices)}, but must be an int32 tensor, a list of "
                "whole numbers, or a fastlora.AdapterMapping"
            ) from None
    integers = indices.dtype in (torch.int32, torch.int64)
    if not integers or indices.layout is not torch.strided or indices.is_nested:
        raise TypeError(
            f"adapter_indices has dtype {indices.dtype} and layout {indices.layout}, but must be "
            "dense and int32: call adapter_indices.to(torch.int32)"
        )
    return indices


def sort_items(indices: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """The items in the order of their adapters, int64 [items], and where each one's end.

    The ends are int32 [adapters + 1]; the last is that of the items without an adapter, behind
    which are those with a number that no adapter has.  It reads nothing on the host.
    """
    flat = indices.reshape(-1)
    known = (flat >= -1) & (flat < adapters)
    keys = flat.where(flat >= 0, adapters).where(known, adapters + 1)
    keys, order = keys.sort(stable=True)
    numbers = torch.arange(adapters + 1, dtype=keys.dtype, device=keys.device)
    return order, torch.searchsorted(keys, numbers, right=True, out_int32=True)


def shares_of(order: Tensor, ends: Tensor, device: torch.device) -> list[Share]:
    """What :func:`sort_items` found, read on the host.

    Raises ValueError for items whose number no adapter has.
    """
    *stops, last = ends.tolist()
    if last != len(order):
        raise ValueError(
            f"adapter_indices has numbers beyond the adapters: each must be -1 (none) or 0 to "
            f"{len(stops) - 1}, since there are {len(stops)} adapters"
        )
    places = [slice(*pair) for pair in zip([0, *stops[:-1]], stops, strict=True)]
    used = [(i, place) for i, place in enumerate(places) if place.stop > place.start]
    edges = [edge for _, place in used for edge in (place.start, place.stop - 1)]
    numbers = iter(order[edges].tolist())  # the sort is stable, so the two are far enough
    shares = []
    for adapter, place in used:
        first, final = next(numbers), next(numbers)
        together = final - first == place.stop - 1 - place.start
        items = slice(first, final + 1) if together else order[place].to(device)
        shares.append(Share(adapter, items, place))
    return shares


def sorted_on(order: Tensor, ends: Tensor, device: torch.device) -> Sorted:
    """What :func:`sort_items` found, for layers on a device, read on the host."""
    return Sorted(order, shares_of(order, ends, device), {})


class Mix(NamedTuple):
    """What a call with many adapters is besides its tensors and its mapping."""

    layout: Layout  # of its tensors; the scales there are 1, since they are data
    scales: tuple[float, ...]  # of each adapter
    ranks: tuple[int, ...]  # of each; what lies behind it in its tensors is never read
    dropouts: tuple[float, ...]  # of each; 0 while not training
