"""What others do for the same layer, each for one projection."""

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear


def peft_formula(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    """The forward of PEFT's linear layer, casts included; where PEFT is missing it stands in."""
    result = linear(x, weight)
    update = linear(linear(drop(x.to(a.dtype), p, training=p > 0), a), b)
    return (result + update * scale).to(result.dtype)


class AddmmChain(torch.autograd.Function):
    """Products by torch, added in place; saves h, and with dropout also what dropout made."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scale, p):
        dropped, mask = torch.native_dropout(x, p, True) if p > 0 else (x, None)
        h = (dropped @ a.T).mul_(scale)
        ctx.save_for_backward(dropped, mask, weight, a, b, h)
        ctx.scale, ctx.p = scale, p
        return linear(x, weight).addmm_(h, b.T)

    @staticmethod
    def backward(ctx, dy):
        dropped, mask, weight, a, b, h = ctx.saved_tensors
        dh = (dy @ b).mul_(ctx.scale)
        dx = dy @ weight
        if mask is None:
            dx.addmm_(dh, a)
        else:
            dx.add_((dh @ a).mul_(mask), alpha=1.0 / (1.0 - ctx.p))
        return dx, None, dh.T @ dropped, dy.T @ h, None, None


def addmm_chain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    return AddmmChain.apply(x, weight, a, b, scale, p)


def peft_layers(weights, pairs, scale: float, p: float) -> list[nn.Module]:
    """PEFT's own layers on these very tensors, in training mode."""
    import peft

    from ..layers import Group

    bases = []
    for weight in weights:
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        base.weight = weight
        bases.append(base)
    r = len(pairs[0][0])
    config = peft.LoraConfig(
        r=r, lora_alpha=scale * r, lora_dropout=p, target_modules=r"layers\.\d+"
    )
    model = peft.get_peft_model(Group(bases), config, autocast_adapter_dtype=False).train()
    layers = list(model.base_model.model.layers)
    for layer, (a, b) in zip(layers, pairs, strict=True):
        layer.lora_A["default"].weight = a
        layer.lora_B["default"].weight = b
    return layers
