"""y = x weightᵀ + scale · drop(x) lora_aᵀ lora_bᵀ + bias, written as it is read.

The formula is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv
2106.09685), with dropout on the adapter's input as in PEFT.
"""

from collections.abc import Sequence

from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The textbook LoRA layer, differentiable in every argument.

    x [..., K], weight [N, K], lora_a [r, K], lora_b [N, r], bias [N] -> [..., N], all in one dtype.

    Dropout comes as an explicit ``mask`` of x's shape, true where x is kept (``fastlora``'s
    backends give theirs: ``dropout_mask(seed, shape, p)``); kept values are divided by 1 -
    ``dropout``.  A positive ``dropout`` without a mask is a ValueError, since the oracle draws
    nothing.
    """
    if mask is None and dropout > 0:
        raise ValueError(
            f"dropout is {dropout}, but no mask came: the reference draws none, so give it the mask"
        )
    dropped = x if mask is None else x * mask.to(x.dtype).reshape(x.shape) / (1.0 - dropout)
    y = x @ weight.T + scale * ((dropped @ lora_a.T) @ lora_b.T)
    return y if bias is None else y + bias


def lora_linears(
    x: Tensor,
    projections: Sequence[Sequence],
    *,
    dropout: float = 0.0,
    masks: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Several projections of one x, each with its own mask: one output for each weight.

    A projection is any (weight, lora_a, lora_b, bias, scale), :class:`fastlora.Projection` among
    them.  One whose weight is None adds its low-rank product to the output before it.
    """
    masks = [None] * len(projections) if masks is None else masks
    ys: list[Tensor] = []
    for (weight, lora_a, lora_b, bias, scale), mask in zip(projections, masks, strict=True):
        adds = weight is None
        if adds:
            weight = lora_b.new_zeros(lora_b.shape[0], lora_a.shape[1])
        y = lora_linear(
            x, weight, lora_a, lora_b, bias=bias, scale=scale, dropout=dropout, mask=mask
        )
        ys.append(ys.pop() + y if adds else y)
    return tuple(ys)
