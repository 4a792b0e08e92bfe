"""The order of experts' rows: sorting by expert, parts of a few experts, and the sums of tokens.

Rows are sorted by expert because the kernels, and the products on a CPU, need each expert's rows
next to each other.  With 3 experts and 2 tokens, k = 2:

    index   [[2, 0], [0, 1]]    the experts of each token, [T, k]
    order   [1, 2, 3, 0]        positions in index, read as one vector, in the order of experts
    ends    [2, 3, 4]           expert 0 has rows 0 and 1, expert 1 row 2, expert 2 row 3
    tokens  [0, 1, 1, 0]        order // k: row i is a copy of x[tokens[i]]
    places  [[3, 0], [1, 2]]    the rows of each token: the inverse of order
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..call.rows import Rows


class Part(NamedTuple):
    """Consecutive experts, and their rows."""

    experts: slice  # of the stacked tensors
    rows: slice  # of the S sorted rows
    segments: Rows  # the same rows, cut by expert; ends count from the part's first row
    is_whole: bool = False  # has all experts and all rows, also rows of no expert

    def on_host(self) -> "Part":
        """The part with the ends of its segments read, once for all products."""
        shares = self.segments.shares_of(self.rows.stop - self.rows.start)
        return self._replace(segments=self.segments._replace(shares=shares))


class Routing(NamedTuple):
    """The sorted rows of a mixture; the module's docstring has an example.

    Entries of index that name no expert are sorted to the end, after the last of ``ends``.
    """

    order: Tensor  # int64 [S], a permutation
    ends: Tensor  # int32 [E], as in Rows
    k: int  # experts for each token

    @property
    def tokens(self) -> Tensor:
        """The token of each row, [S]."""
        return self.order.div(self.k, rounding_mode="floor")

    @property
    def places(self) -> Tensor:
        """The rows of each token, [T, k]."""
        # The inverse permutation: places[order[i]] = i.
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), dtype=places.dtype, device=places.device)
        return places.view(-1, self.k)

    def row_weights(self, weights: Tensor, part: Part) -> Tensor:
        """The routing weights of a part's rows, [rows, 1], from the tokens' ``weights`` [T, k]."""
        return weights.reshape(-1)[self.order[part.rows]].unsqueeze(1)

    def parts(self, most: int | None) -> list[Part]:
        """All experts, in parts of at most ``most`` rows; an expert with more rows is one part.

        None: all experts at once, without reading the ends on the host.  Rows of no expert are in a
        part only if there is one part with all S rows.
        """
        whole = Part(slice(0, len(self.ends)), slice(0, len(self.order)), Rows(self.ends), True)
        if most is None:
            return [whole]
        parts, first, start = [], 0, 0
        if len(self.order) <= most or len(self.ends) == 1:
            parts = [whole]
        else:
            ends = self.ends.tolist()
            for e, end in enumerate(ends, 1):
                # The part ends before expert e if e's rows would make it longer than ``most``.
                if e == len(ends) or ends[e] - start > most:
                    segments = Rows(self.ends[first:e] - start, first=start)
                    parts.append(Part(slice(first, e), slice(start, end), segments))
                    first, start = e, end
        return [part.on_host() for part in parts]

    def sums(self, rows: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The sum of each token's rows, times ``weights`` [T, k] if given: [S, N] -> [T, N].

        If the dtypes agree, ``embedding_bag`` computes it without a sorted copy of the rows.
        """
        if rows.dtype == dtype and (weights is None or weights.dtype == dtype):
            return embedding_bag(self.places, rows, mode="sum", per_sample_weights=weights)
        return self.plain_sums(rows, weights, dtype)

    def plain_sums(self, rows: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As :meth:`sums`, by operations that autograd and all modes of torch support.

        The sum is rounded to ``dtype`` once.
        """
        chosen = rows[self.places]
        if weights is not None:
            chosen = chosen * weights.unsqueeze(-1)
        return chosen.sum(1, dtype=torch.promote_types(chosen.dtype, dtype)).to(dtype)

    def added(
        self,
        total: Tensor | None,
        rows: Tensor,
        part: Part,
        dtype: torch.dtype,
        weights: Tensor | None = None,
    ) -> Tensor:
        """total + :meth:`sums` of a part's rows.  ``rows`` and ``total`` may be overwritten.

        ``total`` is None for the first part.  Several parts are added in at least float32.
        """
        if part.is_whole:
            return self.sums(rows, weights, dtype)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if weights is not None:
            rows.mul_(self.row_weights(weights, part))
        if total is None:
            # [T, N], with T = S / k tokens
            total = rows.new_zeros(len(self.order) // self.k, rows.shape[1])
        # Deterministic: parts come only on a CPU, where index_add_ adds row by row, in order.
        return total.index_add_(0, self.tokens[part.rows], rows)


def routing_of(index: Tensor, experts: int) -> Routing:
    """The routing for ``index`` [T, k], the experts of each token.

    A number of ``experts`` or more means no expert.  Nothing is read on the host, so it
    never waits for a GPU.
    """
    sorted_index, order = index.reshape(-1).sort(stable=True)
    numbers = torch.arange(experts, device=index.device, dtype=sorted_index.dtype)
    ends = torch.searchsorted(sorted_index, numbers, right=True, out_int32=True)
    return Routing(order, ends, index.shape[1])
