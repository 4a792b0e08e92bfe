"""Which rows of experts are whose, and which of them are worked on at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..rows import Rows


class Part(NamedTuple):
    """Some experts, one behind the other, and their rows."""

    experts: slice
    rows: slice
    segments: Rows


class Routing(NamedTuple):
    """Which rows are whose.  ``order`` int64 [S]: row i is of token order[i] // k."""

    order: Tensor
    ends: Tensor  # of Rows
    k: int

    @property
    def rows(self) -> Rows:
        return Rows(self.ends)

    @property
    def tokens(self) -> Tensor:
        return self.order.div(self.k, rounding_mode="floor")

    @property
    def places(self) -> Tensor:
        """The rows of each token, [T, k]."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), dtype=places.dtype, device=places.device)
        return places.view(-1, self.k)

    def shares(self, weights: Tensor, part: Part) -> Tensor:
        """The weight of each of a part's rows, [rows, 1], of those of the tokens [T, k]."""
        return weights.reshape(-1)[self.order[part.rows]].unsqueeze(1)

    def whole(self) -> list[Part]:
        """All experts at once."""
        experts, rows = len(self.ends), len(self.order)
        return [Part(slice(0, experts), slice(0, rows), Rows(self.ends))]

    def parts(self, most: int) -> list[Part]:
        """All experts, some at a time, of at most so many rows or one alone.

        It reads the ends on the host.  Nobody's rows are in a part only if that is the whole.
        """
        if len(self.order) <= most or len(self.ends) == 1:
            return self.whole()
        ends, parts, first, start = self.ends.tolist(), [], 0, 0
        for e, end in enumerate(ends, 1):
            if e == len(ends) or ends[e] - start > most:
                segments = Rows(self.ends[first:e] - start, first=start)
                parts.append(Part(slice(first, e), slice(start, end), segments))
                first, start = e, end
        return parts

    def sums(self, rows: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The sum of each token's rows, times its weights [T, k] if any: [S, N] -> [T, N].

        Where all have one dtype, torch's bag of embeddings is this, without a copy of the rows.
        """
        if rows.dtype == dtype and (weights is None or weights.dtype == dtype):
            return embedding_bag(self.places, rows, mode="sum", per_sample_weights=weights)
        return self.plain_sums(rows, weights, dtype)

    def plain_sums(self, rows: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The same by operations that everything of torch's can follow; rounded once, to dtype."""
        chosen = rows[self.places]
        if weights is not None:
            chosen = chosen * weights.unsqueeze(-1)
        return chosen.sum(1, dtype=torch.promote_types(chosen.dtype, dtype)).to(dtype)


class Sums:
    """The sum of each token's rows as in :meth:`Routing.sums`, of rows that come part by part."""

    def __init__(self, routing: Routing, parts: Sequence[Part], dtype: torch.dtype) -> None:
        self.dtype = dtype
        # One expert alone may have every row beside others that have none.
        self.is_whole = len(parts) == 1 and parts[0].rows == slice(0, len(routing.order))
        self.routing = routing
        self.total: Tensor | None = None

    def add(self, rows: Tensor, part: Part, weights: Tensor | None = None) -> None:
        """It may write over the rows.  Those of several parts are added in float32 at least."""
        routing = self.routing
        if self.is_whole:
            self.total = routing.sums(rows, weights, self.dtype)
            return
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if weights is not None:
            rows.mul_(routing.shares(weights, part))
        if self.total is None:
            self.total = rows.new_zeros(len(routing.order) // routing.k, rows.shape[1])
        # On a CPU it adds row by row, in this order.
        self.total.index_add_(0, routing.tokens[part.rows], rows)

    @property
    def sums(self) -> Tensor:
        """What was added."""
        assert self.total is not None
        return self.total.to(self.dtype)


def routing_of(index: Tensor, experts: int) -> Routing:
    """Of the experts [T, k] of every token; a number from ``experts`` on is nobody's.

    Nothing is read on the host.
    """
    sorted_index, order = index.reshape(-1).sort(stable=True)
    numbers = torch.arange(experts, device=index.device, dtype=sorted_index.dtype)
    ends = torch.searchsorted(sorted_index, numbers, right=True, out_int32=True)
    return Routing(order, ends, index.shape[1])
