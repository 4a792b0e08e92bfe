"""The other oracles: experts, many adapters, DoRA, a gated MLP, a loss.

Except for DoRA, they apply :mod:`fastlora.reference`'s formula in a loop.  They use plain autograd
and no code of any backend, and run in float64.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.reference import lora_linear, lora_linears


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor | Sequence[int],
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Rows sorted by expert, each through its expert's layer; differentiable in every tensor.

    x [S, K], weight [E, N, K], lora_a [E, r, K], lora_b [E, N, r], bias [E, N] -> [S, N], all in
    one dtype.  ``offsets`` [E] has the end of each expert's rows.  Rows after the last end belong
    to no expert: their outputs are zero, and their values have no effect.

    Dropout is given as an explicit ``mask`` [S, K], as in :func:`lora_linear`.
    """
    ends = [int(end) for end in offsets]
    ys, start = [], 0
    for e, end in enumerate(ends):
        ys.append(
            lora_linear(
                x[start:end],
                weight[e],
                lora_a[e],
                lora_b[e],
                bias=None if bias is None else bias[e],
                scale=scale,
                dropout=dropout,
                mask=None if mask is None else mask[start:end],
            )
        )
        start = end
    ys.append(x.new_zeros(len(x) - start, weight.shape[1]))
    return torch.cat(ys)


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
    lists of the adapters' own [r, K] and [N, r]; all in one dtype.  ``adapter_indices``, integers,
    has the shape of x's first dimensions; -1 means no adapter.  For adapter i, only the first
    ``ranks[i]`` rows of lora_a and columns of lora_b count.

    ``masks``: one [rows, K] for each adapter with dropout, over the adapter's own rows in order.
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


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropped: Tensor | None = None,
) -> Tensor:
    """x weightᵀ + bias + DoRA's change; differentiable in every argument.

    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353).  The norm is
    outside of the gradient (its section 4.3), and dropout is PEFT's.

    x [..., K], weight [N, K], lora_a [r, K], lora_b [N, r], magnitude and bias [N] -> [..., N], all
    in one dtype.  ``dropped`` is x after dropout; None without dropout.  With merged = weight +
    scale lora_b lora_a, the adapter's change is dropped times this matrix, row by row:

        (magnitude_i / ‖merged_i‖) · merged_i - weight_i
    """
    dropped = x if dropped is None else dropped
    merged = weight + scale * (lora_b @ lora_a)
    gain = magnitude / merged.norm(dim=1).detach()
    change = gain * (dropped @ weight.T + scale * ((dropped @ lora_a.T) @ lora_b.T))
    y = x @ weight.T + change - dropped @ weight.T
    return y if bias is None else y + bias


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) ∘ up for tensors of one shape, from exponentials, tanh and erf."""
    if activation == "silu":
        act = gate / (1.0 + torch.exp(-gate))
    elif activation == "gelu":
        act = 0.5 * gate * (1.0 + torch.erf(gate / math.sqrt(2.0)))
    elif activation == "gelu_tanh":
        inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)
        act = 0.5 * gate * (1.0 + torch.tanh(inner))
    elif activation in ("relu", "relu2"):
        act = torch.where(gate > 0, gate, 0.0)
        act = act if activation == "relu" else act * act
    else:
        raise ValueError(f"there is no activation {activation!r} here")
    return act * up


def gated_mlp(
    x: Tensor,
    gate: Sequence,
    up: Sequence,
    down: Sequence,
    activation: str,
    *,
    dropout: float = 0.0,
    masks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """down(act(gate(x)) ∘ up(x)), differentiable in every argument, all in one dtype.

    Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202); each product is a LoRA layer or
    a frozen layer.

    x [..., K]; gate and up map to [..., I], and down maps back to [..., K].  Each has the form that
    :func:`lora_linears` takes.  ``masks``: one for each adapter, in the order gate, up, down; the
    masks of down have the shape of act(gate(x)).
    """
    count = len(_adapters(gate)) + len(_adapters(up))
    first = None if masks is None else masks[:count]
    last = None if masks is None else masks[count:]
    its_gate, its_up = lora_linears(x, [gate, up], dropout=dropout, masks=first)
    product = gated(its_gate, its_up, activation)
    return lora_linears(product, [down], dropout=dropout, masks=last)[0]


def row_losses(z: Tensor, target: Tensor, settings: tuple) -> Tensor:
    """The cross-entropy of each row of logits z [..., V] for the classes ``target`` [...].

    ``settings`` are those of ``LossSettings``.
    """
    label_smoothing, softcap, logit_scale, z_loss = settings
    s = z * logit_scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    logprob = torch.log_softmax(s, -1)
    loss = (label_smoothing - 1.0) * logprob.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return loss - label_smoothing * logprob.mean(-1) + z_loss * torch.logsumexp(s, -1) ** 2


def _adapters(projection: Sequence) -> Sequence:
    return projection[1] if len(projection) == 2 else (projection,)
