"""The contestants of a row, and their tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import fastlora

from . import blocks, contestants
from .cases import ADAPTERS, Case
from .contestants import Maker, Tensors, fastlora_layer, frozen, peft_batch, peft_layer


@contextmanager
def _by_plan(name: str) -> Iterator[None]:
    """A context: the triton backend with one plan, "FUSED" or "IN_PLACE"."""
    from fastlora.kernels import plan

    with fastlora.use_backend("triton"), plan.use_plan(getattr(plan, name)):
        yield


def makers_for(case: Case) -> dict[str, Maker]:
    """Makers by name: first the frozen layer, the baseline of all; fastlora last."""
    optimized = partial(peft_layer, optimized=True)
    if case.block:
        return blocks.makers_for(case)
    if case.table == "optimized":
        return {"frozen": frozen, "peft": peft_layer, "fastlora": optimized}
    if case.table == "mixed":
        apart = {"single calls": contestants.single_calls}
        of_peft = {"peft": peft_batch, "peft, optimized": partial(peft_batch, optimized=True)}
        return {"frozen": frozen, **apart, **of_peft, "fastlora": contestants.at_once}
    if case.table == "8 bits":
        peft = {"peft": peft_layer, "peft, optimized": optimized}
        return {"frozen": frozen, **peft, "fastlora": partial(peft_layer, base="int8", int8_from=0)}
    is_plain = case.table == "layers" or len(case.outputs) > 1  # LoRALinear, or a group of them
    fast = fastlora_layer if is_plain else contestants.injected_layer
    if case.table not in ("gpu", "host"):
        return {"frozen": frozen, "peft": peft_layer, "fastlora": fast}
    return {
        "frozen": frozen,
        "fused": partial(fastlora_layer, chosen=partial(_by_plan, "FUSED")),
        "in place": partial(fastlora_layer, chosen=partial(_by_plan, "IN_PLACE")),
        "torch backend": partial(fastlora_layer, chosen=partial(fastlora.use_backend, "torch")),
        "peft": peft_layer,
        **({"merged": contestants.merged} if case.decodes else {}),
        "fastlora": fast,
    }


def make_tensors(case: Case, device: torch.device) -> Tensors:
    if case.block:
        return blocks.make_tensors(case, device)
    torch.manual_seed(0)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device).mul_(std).to(case.dtype)

    pairs = []
    count = ADAPTERS if case.table == "mixed" else 2 if case.kind == "two-adapters" else 1
    for N in case.outputs * count:
        a, b = random(case.r, case.K, std=case.K**-0.5), random(N, case.r, std=case.r**-0.5)
        pairs.append((nn.Parameter(a), nn.Parameter(b)))
    wide = [(nn.Parameter(a.float()), nn.Parameter(b.float())) for a, b in pairs]
    weights = [random(N, case.K, std=case.K**-0.5) for N in case.outputs]
    tensors = Tensors(
        x=random(case.M, case.K).requires_grad_(),
        dys=tuple(random(case.M, N) for N in case.outputs),
        weights=tuple(nn.Parameter(weight, requires_grad=False) for weight in weights),
        adapters={torch.float32: wide, case.dtype: pairs},
    )
    return _quantized(case, tensors) if case.table == "quantized" else tensors


def _quantized(case: Case, tensors: Tensors) -> Tensors:
    """The tensors with a vendor's layer, and with its dequantized weight as weight.

    Skips the row without that vendor.
    """
    from vendor_layers import quantized

    from fastlora.formats import quantized_weight

    torch.manual_seed(0)
    layer = quantized(case.kind, case.K, *case.outputs, case.dtype)
    layer.bias = None
    weight = quantized_weight(layer).weight.dense(case.dtype)
    return replace(tensors, weights=(nn.Parameter(weight, requires_grad=False),), base=layer)
