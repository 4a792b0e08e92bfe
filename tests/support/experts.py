"""Experts with an adapter each, and the judge of their op: the oracle, in float64."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from judge import assert_close, masks_of, to_float64, with_seed
from torch import Tensor

import fastlora
from fastlora import reference
from fastlora.formats.format import Quantised


class Experts(NamedTuple):
    """The tensors of a call, but x."""

    weight: Tensor | Quantised
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None = None


def make_experts(
    experts: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = False,
) -> Experts:
    """Random tensors that all require gradients but the base weight."""
    shapes = (experts, n, k), (experts, r, k), (experts, n, r)
    weight, lora_a, lora_b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    lora_a, lora_b = (t.to(adapter_dtype or dtype).requires_grad_() for t in (lora_a, lora_b))
    shift = torch.randn(experts, n).to(dtype).requires_grad_() if bias else None
    return Experts(weight.to(dtype), lora_a, lora_b, shift)


def make_rows(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, k, dtype=torch.float64).to(dtype).requires_grad_()


def ends_of(counts: Sequence[int]) -> Tensor:
    """The offsets of experts with so many rows each."""
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def call(x: Tensor, experts: Experts, offsets: Tensor, **options) -> Tensor:
    weight, lora_a, lora_b, bias = experts
    return fastlora.lora_grouped(x, weight, lora_a, lora_b, offsets, bias=bias, **options)


def check_against_oracle(
    x: Tensor,
    experts: Experts,
    offsets: Tensor,
    p: float = 0.0,
    make_dy: Callable[[Tensor], Tensor] = torch.randn_like,
) -> dict[str, Tensor]:
    """y and every gradient, no further from the truth than twice PyTorch's own error."""
    scale = 0.75
    y, seeds = with_seed(lambda: call(x, experts, offsets, scale=scale, dropout=p), 1)
    dy = make_dy(y.detach())
    masks = masks_of(seeds, x, p)
    mask = None if masks is None else masks[0]
    found = {"y": y} | _gradients(y, dy, x, experts)

    def run(convert: Callable[[Tensor], Tensor], dy: Tensor) -> dict[str, Tensor]:
        own_x = convert(x)
        weight = experts.weight
        if isinstance(weight, Quantised):
            weight = weight.dense(x.dtype)
        plain = experts._replace(weight=weight)
        leaves = Experts(*[None if t is None else convert(t) for t in plain])
        cast = [None if t is None else t.to(own_x.dtype) for t in leaves]
        *tensors, bias = cast
        y = reference.lora_grouped(
            own_x, *tensors, offsets, bias=bias, scale=scale, dropout=p, mask=mask
        )
        return {"y": y} | _gradients(y, dy.to(own_x.dtype), own_x, leaves)

    truth, eager = run(to_float64, dy), run(lambda tensor: tensor, dy)
    size = run(lambda tensor: to_float64(tensor).abs(), dy.abs())
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert_close(name, value, truth[name], eager[name], size[name], x.dtype)
    return found


def _gradients(y: Tensor, dy: Tensor, x: Tensor, experts: Experts) -> dict[str, Tensor]:
    leaves = {"x": x} | experts._asdict()
    leaves = {name: t for name, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
