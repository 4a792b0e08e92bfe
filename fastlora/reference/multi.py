"""Many adapters over one base, written as they are read: a loop over the adapters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .lora import lora_linear


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    adapter_indices: Tensor,
    *,
    bias: Tensor | None = None,
    scales: Sequence[float],
    ranks: Sequence[int] | None = None,
    dropouts: Sequence[float] | None = None,
    masks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Each row of x through the layer with its own adapter; differentiable in every tensor.

    x [..., K], weight [N, K], bias [N]; lora_a and lora_b are banks [n, r, K] and [n, N, r], or
    lists of the adapters' own [r, K] and [N, r]; all in one dtype.  ``adapter_indices``, whole
    numbers, has the shape of x's first dimensions; -1 is for no adapter.  Of adapter i only the
    first ``ranks[i]`` rows of lora_a and columns of lora_b count.

    ``masks``: for each adapter that drops one [rows, K] of the rows that are its own, in their
    order.
    """
    rows = x.reshape(-1, x.shape[-1])
    repeats = len(rows) // max(1, adapter_indices.numel())
    owners = adapter_indices.reshape(-1).repeat_interleave(repeats)
    nobody = (owners == -1).nonzero().flatten()
    alone = rows[nobody] @ weight.T
    places, ys = [nobody], [alone if bias is None else alone + bias]
    for i, scale in enumerate(scales):
        its_rows = (owners == i).nonzero().flatten()
        rank = lora_a[i].shape[0] if ranks is None else ranks[i]
        places.append(its_rows)
        ys.append(
            lora_linear(
                rows[its_rows],
                weight,
                lora_a[i][:rank],
                lora_b[i][:, :rank],
                bias=bias,
                scale=scale,
                dropout=0.0 if dropouts is None else dropouts[i],
                mask=None if masks is None else masks[i],
            )
        )
    y = torch.cat(ys)[torch.cat(places).argsort()]
    return y.reshape(*x.shape[:-1], weight.shape[0])
