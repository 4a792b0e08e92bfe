"""The sizes of a base product, of which a plan is chosen: what tuning goes by."""

from dataclasses import dataclass

import torch

from ..formats.format import name_of


@dataclass(frozen=True)
class Sizes:
    """Of y of one output, or with ``backward`` of dx, which is of all outputs of a call.

    x is [``rows``, ``features``], each output [``rows``, one of ``outs``], with an adapter for each
    of its ``ranks``.  Of ``experts`` each has as many rows.
    """

    rows: int
    features: int
    outs: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    adapter_dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    backward: bool = False
    experts: int = 0

    def __str__(self) -> str:
        outs = "+".join(map(str, self.outs))
        ranks = "+".join(str(r) for of_output in self.ranks for r in of_output)
        words = [f"{'dx' if self.backward else 'y'} {self.rows}x{self.features}x{outs}, r {ranks}"]
        words += [f"{self.experts} experts"] * bool(self.experts) + [name_of(self.dtype)]
        return ", ".join(words + ["dropout"] * bool(self.dropout))
