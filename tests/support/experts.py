"""Experts with an adapter each."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastlora
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
