"""The oracle: y = x weightᵀ + scale · drop(x) lora_aᵀ lora_bᵀ + bias, in plain PyTorch.

It shares no code with the backends.  Run it in float64, under plain autograd, to test an
implementation.  It is not fast, saves every intermediate for backward, and checks little.

The formula comes from Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv
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
    """A LoRA layer, differentiable in every tensor.

    x [..., K], weight [N, K], lora_a [r, K], lora_b [N, r], bias [N] -> [..., N], all in one dtype.

    Dropout needs an explicit ``mask`` of x's shape, true where x is kept.  Kept values are divided
    by 1 - ``dropout``.  fastlora's backends make their masks with ``dropout_mask(seed, shape, p)``.
    Raises ValueError for a positive ``dropout`` without a mask, because the oracle draws no random
    numbers.
    """
    projection = (weight, lora_a, lora_b, bias, scale)
    return lora_linears(x, [projection], dropout=dropout, masks=None if mask is None else [mask])[0]


def lora_linears(
    x: Tensor,
    projections: Sequence[Sequence],
    *,
    dropout: float = 0.0,
    masks: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Several outputs of one x.  ``masks`` has a mask for each adapter, in their order.

    A projection is (weight, lora_a, lora_b, bias, scale), like :class:`fastlora.Projection`.  With
    weight None, its low-rank product is added to the output before it.  A projection may also be
    ((weight, bias), adapters) with any number of adapters (lora_a, lora_b, scale).
    """
    outputs: list[tuple] = []
    for projection in projections:
        if len(projection) == 2:
            outputs.append(tuple(projection))
            continue
        weight, lora_a, lora_b, bias, scale = projection
        base, adapters = ((weight, bias), ()) if weight is not None else outputs.pop()
        outputs.append((base, (*adapters, (lora_a, lora_b, scale))))
    if masks is None and dropout > 0:
        raise ValueError(
            f"dropout is {dropout}, but no mask was passed, and the reference draws none"
        )
    count = sum(len(adapters) for _, adapters in outputs)
    mask_of_next = iter([None] * count if masks is None else masks)
    ys = []
    for (weight, bias), adapters in outputs:
        y = x @ weight.T if bias is None else x @ weight.T + bias
        for lora_a, lora_b, scale in adapters:
            mask = next(mask_of_next)
            dropped = x if mask is None else x * mask.to(x.dtype).reshape(x.shape) / (1.0 - dropout)
            y = y + scale * ((dropped @ lora_a.T) @ lora_b.T)
        ys.append(y)
    return tuple(ys)
