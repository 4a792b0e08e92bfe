"""How the rows of a call are cut into segments: by expert, or by adapter."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .formats.format import Quantized
from .projection import Adapter, Base, Output, check_scale, is_plain, shown

# What stands in the place of a base that was done already: what comes is added to it.
NO_BASE: Base = Base(None)


class Share(NamedTuple):
    """The items of one segment.  An item is a row of x, or as many rows as each item has."""

    segment: int
    items: slice | Tensor  # where they lie together a slice, else their numbers, ascending
    place: slice  # in the sorted order


class HostNumbers(NamedTuple):
    """What each segment has for itself, on the host."""

    scales: tuple[float, ...]
    ranks: tuple[int, ...]  # what lies behind it in an adapter's tensors is never read
    dropouts: tuple[float, ...]  # 0 while not training


class Rows(NamedTuple):
    """The rows of x, cut into segments, any of which may be empty.

    *Experts*: rows lie sorted, and each segment has a layer of its own: weight [E, N, K], and so
    on.  *Many adapters*: the base is shared, and each segment has an adapter and ``numbers``
    for it.  What is sorted there are items, and ``order`` has where each lies.

    ``ends``, int32 [segments], has the number of the row or item behind each segment's last, as in
    ``torch.nn.functional.grouped_mm``.  Rows behind the last end are nobody's: experts make zeros
    of them, and of many adapters the base alone has them.
    """

    ends: Tensor
    order: Tensor | None = None  # int64 [items]; None: as they lie
    numbers: HostNumbers | None = None
    first: int = 0  # how many rows of the call lie before these, for a mask of dropout
    shares: list[Share] | None = None  # of segments with items, where they are known on the host
    memo: dict | None = None  # what a backend made of it for all layers that share it
    of_banks: bool = False  # whether many adapters' tensors are views of two banks, by unbind

    @property
    def shares_base(self) -> bool:
        """Whether all segments have one base."""
        return self.order is not None

    def items(self, rows: int) -> int:
        """How many there are, of so many rows."""
        return rows if self.order is None else len(self.order)

    def shares_of(self, rows: int) -> list[Share]:
        """The segments that have rows, of so many; on a GPU it may wait for ``ends``.

        Raises ValueError for ends that decrease, or lie beyond the rows.
        """
        if self.shares is not None:
            return self.shares
        ends = self.ends.tolist()
        starts, edges = [0, *ends[:-1]], [0, *ends, rows]
        if edges != sorted(edges):
            raise ValueError(
                f"offsets are {shown(ends)}, but must be the ends of the experts' rows: none below "
                f"the one before it, and none above {rows}, the rows of x"
            )
        places = enumerate(map(slice, starts, ends))
        return [Share(e, at, at) for e, at in places if at.stop > at.start]

    def of_rows(self, rows: int) -> Tensor:
        """The segment of each of so many sorted rows, int64, on the device; E for nobody's."""
        numbers = torch.arange(rows, dtype=torch.int32, device=self.ends.device)
        return torch.searchsorted(self.ends.contiguous(), numbers, right=True)

    def part(self, output: Output[Tensor], segment: int) -> Output[Tensor]:
        """What a segment's rows go through: views.  A base that is shared isn't part of it."""
        (weight, bias), adapters = output
        if self.numbers is not None:
            lora_a, lora_b, _ = adapters[segment]
            rank = self.numbers.ranks[segment]
            cut = Adapter(lora_a[:rank], lora_b[:, :rank], self.numbers.scales[segment])
            return Output(NO_BASE, (cut,))
        part = weight.one(segment) if isinstance(weight, Quantized) else weight[segment]
        base = Base(part, None if bias is None else bias[segment])
        return Output(base, tuple([Adapter(a[segment], b[segment], s) for a, b, s in adapters]))


def take(matrix: Tensor, share: Share, items: int) -> Tensor:
    """A segment's rows of a matrix of so many items: a view, where they lie together."""
    if isinstance(share.items, slice):
        rows = matrix.shape[0] // items
        return matrix[share.items.start * rows : share.items.stop * rows]
    return matrix.unflatten(0, (items, -1)).index_select(0, share.items).flatten(0, 1)


class Numbers(NamedTuple):
    """Each adapter's own: lists, or tensors [n], which may be a compiler's, without numbers."""

    scales: Tensor | list[float]
    ranks: Tensor | list[int]
    dropouts: list[float]

    def as_tensors(self) -> tuple[Tensor, Tensor]:
        """Scales and ranks, on the CPU."""
        scales = torch.as_tensor(self.scales, dtype=torch.float64, device="cpu")
        return scales, torch.as_tensor(self.ranks, dtype=torch.int64, device="cpu")

    def on_host(self, adapters: Sequence[Adapter[Tensor]]) -> HostNumbers:
        """Raises ValueError for a scale or a rank that no adapter can have."""
        scales, ranks = map(as_list, self[:2])
        for i, (scale, rank, adapter) in enumerate(zip(scales, ranks, adapters, strict=True)):
            check_scale(scale)
            most = adapter.lora_a.shape[0]
            if type(rank) is not int or not 1 <= rank <= most:
                raise ValueError(
                    f"ranks[{i}] is {shown(rank)}, but must be a whole number from 1 to {most}, "
                    "the rows of its lora_a"
                )
        return HostNumbers(tuple(scales), tuple(ranks), tuple(self.dropouts))


def as_list(numbers: Tensor | list) -> list:
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers


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
        self._rows: dict[torch.device, Rows] = {}
        if indices.device.type == "cpu" and is_plain(indices) and not is_compiling():
            self.on(indices.device)

    def on(self, device: torch.device) -> Rows:
        """For layers on this device."""
        if device not in self._rows:
            self._rows[device] = rows_on(self.order, self.ends, device)
        return self._rows[device]


def as_indices(indices: Tensor | Sequence[int]) -> Tensor:
    """A tensor of them.  Raises TypeError for what can't say which adapter an item belongs to."""
    if not isinstance(indices, Tensor):
        try:
            numbers = torch.tensor(indices, dtype=None, device="cpu")  # None: what they are
            if numbers.numel() and numbers.dtype != torch.int64:
                raise TypeError
            return numbers.to(torch.int32)
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


def rows_on(order: Tensor, ends: Tensor, device: torch.device) -> Rows:
    """What :func:`sort_items` found, for layers on a device, read on the host.

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
    return Rows(ends[:-1], order, shares=shares, memo={})


class Many(NamedTuple):
    """How a call with many adapters is cut, before anything of it is read on the host."""

    indices: Tensor | Sequence[int] | AdapterMapping
    numbers: Numbers
    of_banks: bool

    def on(self, device: torch.device, adapters: Sequence[Adapter[Tensor]]) -> Rows:
        """For a call on this device."""
        mapping = self.indices
        if not isinstance(mapping, AdapterMapping):
            mapping = AdapterMapping(mapping, len(adapters))
        numbers = self.numbers.on_host(adapters)
        return mapping.on(device)._replace(numbers=numbers, of_banks=self.of_banks)

    def sorted(self, count: int) -> tuple[Tensor, Tensor]:
        """Order and ends by torch's operations alone: a compiler merges those of all layers."""
        if isinstance(self.indices, AdapterMapping):
            return self.indices.order, self.indices.ends
        return sort_items(as_indices(self.indices), count)
