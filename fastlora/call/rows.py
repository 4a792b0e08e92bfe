"""Segments: which rows of a call belong to which expert, or to which adapter.

All experts or adapters then run in one grouped call.  A step of eight adapters in one call takes
0.48 to 0.83 × the time of eight separate steps (``python -m tools.sweep_speed 16 256``).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..common.text import shown
from ..common.values import check_scale
from ..formats.format import Quantized
from .projection import Adapter, Base, Output, is_plain

# In place of a base that many adapters share: its product is computed once for all rows, and each
# adapter's part is added to its rows.
NO_BASE: Base = Base(None)


class Share(NamedTuple):
    """A segment that isn't empty, with the places of its items before and after sorting.

    An item is one row of x, or one sequence of rows (:class:`AdapterMapping`).
    """

    segment: int
    items: slice | Tensor  # in x: a slice if the items are contiguous, else indices, ascending
    place: slice  # in the sorted order of all items


class HostNumbers(NamedTuple):
    """The scale, rank and dropout of each segment, on the host."""

    scales: tuple[float, ...]
    ranks: tuple[int, ...]  # rows of lora_a and columns of lora_b beyond the rank are never read
    dropouts: tuple[float, ...]  # 0 while not training


class Rows(NamedTuple):
    """The rows of x, cut into segments; a segment may be empty.

    *Experts*: the rows of x are sorted by expert.  Segment e has its own layer: weight[e], …

    *Many adapters*: all segments share one base.  Segment i has adapter i and entry i of
    ``numbers``.  The rows of x aren't sorted: order = argsort(the segment of each item), so
    position s of the sorted order is item order[s].

    Segment e has the sorted rows (or items) ends[e - 1] … ends[e] - 1, as in
    ``torch.nn.functional.grouped_mm``.  Rows from the last end on belong to no segment: experts
    return zeros there, and a call with many adapters returns the base's output.
    """

    ends: Tensor  # int32 [segments]
    order: Tensor | None = None  # int64 [items]; None: rows are already sorted
    numbers: HostNumbers | None = None
    first: int = 0  # row 0 of x is row ``first`` of the call, and of its dropout mask
    shares: list[Share] | None = None  # nonempty segments, if the ends were read on the host
    memo: dict | None = None  # a backend's cache, shared by all layers with these rows
    # Whether all lora_a are views of one bank [n, r, K], and all lora_b of another, by ``unbind``.
    of_banks: bool = False

    @property
    def has_one_base(self) -> bool:
        """Whether all segments use one base: many adapters, not experts."""
        return self.order is not None

    def items(self, rows: int) -> int:
        """The number of items in a call with ``rows`` rows."""
        return rows if self.order is None else len(self.order)

    def shares_of(self, rows: int) -> list[Share]:
        """The nonempty segments of a call with ``rows`` rows.

        Raises ValueError if ``ends`` decrease or exceed ``rows``.
        """
        if self.shares is not None:
            return self.shares
        ends = self.ends.tolist()  # on a GPU this waits for the device
        # The rows of experts are sorted, so a segment's items and its place are one slice.
        starts, bounds = [0, *ends[:-1]], [0, *ends, rows]
        if bounds != sorted(bounds):
            raise ValueError(
                f"offsets are {shown(ends)}, but must be the ends of the experts' rows: in "
                f"ascending order, and none above {rows}, the rows of x"
            )
        places = enumerate(map(slice, starts, ends))
        return [Share(e, at, at) for e, at in places if at.stop > at.start]

    def of_rows(self, rows: int) -> Tensor:
        """The segment of each of ``rows`` sorted rows, int64, on the device.

        A row that belongs to no segment gets the number of segments, E.
        """
        # segment(row) = the number of ends <= row.
        numbers = torch.arange(rows, dtype=torch.int32, device=self.ends.device)
        return torch.searchsorted(self.ends.contiguous(), numbers, right=True)

    def part(self, output: Output[Tensor], segment: int) -> Output[Tensor]:
        """Views of one segment's tensors.  A shared base is left out (``NO_BASE``)."""
        (weight, bias), adapters = output
        # Many adapters: a list of matrices, which may have more rows than the segment's rank.
        # Experts, below: one stacked tensor for all segments.
        if self.numbers is not None:
            lora_a, lora_b, _ = adapters[segment]
            rank = self.numbers.ranks[segment]
            cut = Adapter(lora_a[:rank], lora_b[:, :rank], self.numbers.scales[segment])
            return Output(NO_BASE, (cut,))
        part = weight.one(segment) if isinstance(weight, Quantized) else weight[segment]
        base = Base(part, None if bias is None else bias[segment])
        return Output(base, tuple([Adapter(a[segment], b[segment], s) for a, b, s in adapters]))


def take(matrix: Tensor, share: Share, items: int) -> Tensor:
    """The rows of one segment in a matrix of ``items`` items; a view if they are contiguous."""
    # An item has len(matrix) / items consecutive rows.
    if isinstance(share.items, slice):
        rows = matrix.shape[0] // items
        return matrix[share.items.start * rows : share.items.stop * rows]
    return matrix.unflatten(0, (items, -1)).index_select(0, share.items).flatten(0, 1)


class Numbers(NamedTuple):
    """Scale, rank and dropout of each adapter: lists, or tensors [n].

    Under torch.compile the tensors may be symbolic, so their values can't be read.  An eager call
    reads and checks them (:meth:`on_host`), and uses the result.
    """

    scales: Tensor | list[float]
    ranks: Tensor | list[int]
    dropouts: list[float]

    def as_tensors(self) -> tuple[Tensor, Tensor]:
        """Scales and ranks, on the CPU."""
        scales = torch.as_tensor(self.scales, dtype=torch.float64, device="cpu")
        return scales, torch.as_tensor(self.ranks, dtype=torch.int64, device="cpu")

    def on_host(self, adapters: Sequence[Adapter[Tensor]]) -> HostNumbers:
        """The values as Python numbers.  Raises ValueError for an invalid scale or rank."""
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
    """The numbers as Python's; a tensor is read on the host."""
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers


class AdapterMapping:
    """Which adapter each item of a batch uses.  All layers, forward and backward, share it.

    ``adapter_indices``: an int32 tensor with an adapter's number for each item; -1 means no
    adapter.  For x [B, T, K], shape [B] means that an item is a sequence, and shape [B, T] that an
    item is a row.  A list has a number for each sequence.  ``adapters`` is the number of adapters.
    Items are sorted here, so later changes of ``adapter_indices`` have no effect.

    If ``adapter_indices`` is on a GPU, the first call waits for the device, and later calls don't.

    Raises TypeError if ``adapter_indices`` is not such a tensor or list.  Raises ValueError if
    ``adapters`` is below 1 or an index is not in [-1, adapters): on a CPU at once, on a GPU in the
    first call.
    """

    def __init__(self, adapter_indices: Tensor | Sequence[int], adapters: int) -> None:
        indices = as_indices(adapter_indices)
        if type(adapters) is not int or not 1 <= adapters < 2**31:  # indices are int32
            raise ValueError(
                f"adapters is {shown(adapters)}, but must be a whole number from 1 on, below 2³¹"
            )
        # Sort once here: all layers use the same order.
        self.adapters, self.shape = adapters, tuple(indices.shape)
        self.order, self.ends = sort_items(indices, adapters)
        self._rows: dict[torch.device, Rows] = {}
        if indices.device.type == "cpu" and is_plain(indices) and not is_compiling():
            self.on(indices.device)

    def on(self, device: torch.device) -> Rows:
        """The rows for layers on this device."""
        if device not in self._rows:
            self._rows[device] = rows_on(self.order, self.ends, device)
        return self._rows[device]


def as_indices(indices: Tensor | Sequence[int]) -> Tensor:
    """The indices as an int32 or int64 tensor.  Raises TypeError for other types and dtypes."""
    if not isinstance(indices, Tensor):
        try:
            # dtype None: torch infers it.
            numbers = torch.tensor(indices, dtype=None, device="cpu")
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
    """Sort items by adapter.  Returns (order, int64 [items]; ends, int32 [adapters + 1]).

    The sorted order: items of adapter 0, 1, …; then items without an adapter, up to ends[-1]; then
    items with an invalid index, which :func:`rows_on` reports.  Nothing is read on the host.
    """
    flat = indices.reshape(-1)
    # Sort keys: the adapter's index; n for -1 (no adapter); n + 1 for an invalid index.
    known = (flat >= -1) & (flat < adapters)
    keys = flat.where(flat >= 0, adapters).where(known, adapters + 1)
    keys, order = keys.sort(stable=True)
    numbers = torch.arange(adapters + 1, dtype=keys.dtype, device=keys.device)
    return order, torch.searchsorted(keys, numbers, right=True, out_int32=True)


def rows_on(order: Tensor, ends: Tensor, device: torch.device) -> Rows:
    """Read the result of :func:`sort_items` on the host, and make the rows for a device.

    Raises ValueError if an item has an invalid index.
    """
    *adapter_ends, last = ends.tolist()  # last: the end of the items without an adapter
    if last != len(order):
        raise ValueError(
            f"adapter_indices has numbers beyond the adapters: each must be -1 (none) or 0 to "
            f"{len(adapter_ends) - 1}, because there are {len(adapter_ends)} adapters"
        )
    places = [slice(*pair) for pair in zip([0, *adapter_ends[:-1]], adapter_ends, strict=True)]
    used = [(i, place) for i, place in enumerate(places) if place.stop > place.start]
    # The sort is stable, so the indices in a segment ascend.  Its items are contiguous if
    # last index - first index == count - 1.  One transfer reads both indices of all segments.
    edges = [edge for _, place in used for edge in (place.start, place.stop - 1)]
    numbers = iter(order[edges].tolist())
    shares = []
    for adapter, place in used:
        first, final = next(numbers), next(numbers)
        adjacent = final - first == place.stop - 1 - place.start
        items = slice(first, final + 1) if adjacent else order[place].to(device)
        shares.append(Share(adapter, items, place))
    # Items without an adapter have no segment, so their end is left out.
    return Rows(ends[:-1], order, shares=shares, memo={})


class Many(NamedTuple):
    """The arguments of a call with many adapters, before any value is read on the host."""

    indices: Tensor | Sequence[int] | AdapterMapping
    numbers: Numbers
    of_banks: bool

    def on(self, device: torch.device, adapters: Sequence[Adapter[Tensor]]) -> Rows:
        """The rows for a call on this device."""
        mapping = self.indices
        if not isinstance(mapping, AdapterMapping):
            mapping = AdapterMapping(mapping, len(adapters))
        numbers = self.numbers.on_host(adapters)
        return mapping.on(device)._replace(numbers=numbers, of_banks=self.of_banks)

    def sorted(self, count: int) -> tuple[Tensor, Tensor]:
        """Order and ends, by torch operations only, so that a compiler can share them."""
        if isinstance(self.indices, AdapterMapping):
            return self.indices.order, self.indices.ends
        return sort_items(as_indices(self.indices), count)
