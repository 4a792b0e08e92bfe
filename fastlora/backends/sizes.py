"""The sizes of a base product.  Tuning measures them, and a plan is chosen by them."""

from dataclasses import dataclass

import torch

from ..formats.format import name_of


@dataclass(frozen=True)
class Sizes:
    """The sizes of one output y; or, with ``backward``, of dx summed over all outputs of a call.

    x is [``rows``, ``features``].  ``outs`` has the columns of each output, and ``ranks`` the ranks
    of its adapters.  With ``experts``, each expert has an equal number of rows.
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
