"""Many adapters over one base, and the judge of their op: a loop of single calls, in float64."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from judge import assert_close, to_float64, with_seed
from torch import Tensor

import fastlora
from fastlora import reference
from fastlora.backends import find_backend


class Adapters(NamedTuple):
    """A base and n adapters: banks, filled with NaN behind each one's rank, or lists."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | list[Tensor]
    lora_b: Tensor | list[Tensor]
    scales: list[float]
    ranks: list[int] | None  # None for lists, which have no more than their ranks


def make_adapters(
    ranks: Sequence[int],
    n: int,
    k: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    *,
    banks: bool = True,
    bias: bool = True,
) -> Adapters:
    """Random tensors that all require gradients but the base weight; unlike scales."""
    own = adapter_dtype or dtype
    down = [torch.randn(r, k, dtype=torch.float64).to(own) for r in ranks]
    up = [torch.randn(n, r, dtype=torch.float64).to(own) for r in ranks]
    weight = torch.randn(n, k, dtype=torch.float64).to(dtype)
    shift = torch.randn(n).to(dtype).requires_grad_() if bias else None
    scales = [0.5 + 0.25 * i for i in range(len(ranks))]
    if not banks:
        lists = [[tensor.requires_grad_() for tensor in tensors] for tensors in (down, up)]
        return Adapters(weight, shift, *lists, scales, None)
    lora_a = torch.full((len(ranks), max(ranks), k), torch.nan, dtype=own)
    lora_b = torch.full((len(ranks), n, max(ranks)), torch.nan, dtype=own)
    for i, r in enumerate(ranks):
        lora_a[i, :r], lora_b[i, :, :r] = down[i], up[i]
    banks_of = lora_a.requires_grad_(), lora_b.requires_grad_()
    return Adapters(weight, shift, *banks_of, scales, list(ranks))


def call(x: Tensor, adapters: Adapters, indices, **options) -> Tensor:
    weight, bias, lora_a, lora_b, scales, ranks = adapters
    options = {"scales": scales, "ranks": ranks, "bias": bias} | options
    return fastlora.multi_lora_linear(x, weight, lora_a, lora_b, indices, **options)


def rows_of(indices: Tensor, x: Tensor, count: int) -> list[int]:
    """How many rows of x each adapter has."""
    repeats = x.numel() // x.shape[-1] // max(1, indices.numel())
    return [int((indices == i).sum()) * repeats for i in range(count)]


def check_against_oracle(
    x: Tensor, adapters: Adapters, indices: Tensor, dropouts: Sequence[float] | None = None
) -> dict[str, Tensor | None]:
    """y and every gradient, no further from the truth than twice PyTorch's own error."""
    count = len(adapters.scales)
    dropouts = [0.0] * count if dropouts is None else list(dropouts)
    run: Callable[[], Tensor] = lambda: call(x, adapters, indices, dropout=dropouts)  # noqa: E731
    y, seeds = with_seed(run, count) if any(dropouts) else (run(), None)
    masks = None
    if seeds is not None:
        make = find_backend("torch").dropout_mask
        shapes = [(rows, x.shape[-1]) for rows in rows_of(indices, x, count)]
        masks = [
            make(seed, shape, p) if p else None
            for seed, shape, p in zip(seeds, shapes, dropouts, strict=True)
        ]
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    found = {"y": y} | gradients(y, dy, x, adapters)

    def reference_of(convert: Callable[[Tensor], Tensor], dy: Tensor) -> dict[str, Tensor]:
        own_x = convert(x)
        leaves = adapters._replace(**{k: convert_all(v, convert) for k, v in tensors(adapters)})
        cast = {k: convert_all(v, lambda t: t.to(own_x.dtype)) for k, v in tensors(leaves)}
        settings = {"scales": adapters.scales, "ranks": adapters.ranks, "dropouts": dropouts}
        y = reference.multi_lora_linear(
            own_x, adapter_indices=indices, masks=masks, **settings, **cast
        )
        return {"y": y} | gradients(y, dy.to(own_x.dtype), own_x, leaves)

    truth, eager = reference_of(to_float64, dy), reference_of(lambda tensor: tensor, dy)
    size = reference_of(lambda tensor: to_float64(tensor).abs(), dy.abs())
    assert found.keys() == truth.keys()
    for name, value in found.items():
        if value is None:  # an adapter of a list without rows
            assert name[-1].isdigit()
            assert not truth[name].any()
        else:
            assert_close(name, value, truth[name], eager[name], size[name], x.dtype)
    return found


def tensors(adapters: Adapters) -> list[tuple[str, Tensor | list[Tensor] | None]]:
    return [pair for pair in adapters._asdict().items() if pair[0] not in ("scales", "ranks")]


def convert_all(value, convert: Callable[[Tensor], Tensor]):
    if isinstance(value, list):
        return [convert(tensor) for tensor in value]
    return None if value is None else convert(value)


def leaves_of(adapters: Adapters) -> dict[str, Tensor]:
    """Every tensor that requires a gradient, by name."""
    named = {}
    for name, value in tensors(adapters):
        many = enumerate(value) if isinstance(value, list) else [("", value)]
        named |= {f"{name}{i}": tensor for i, tensor in many if tensor is not None}
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def gradients(y: Tensor, dy: Tensor, x: Tensor, adapters: Adapters) -> dict[str, Tensor | None]:
    leaves = {"x": x} if x.requires_grad else {}
    leaves |= leaves_of(adapters)
    found = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    return {f"d_{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
