"""The checks of a call with many adapters, and its numbers, which are lists or tensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..mapping import AdapterMapping, Mix, as_indices
from ..projection import (
    Base,
    Output,
    check_call,
    check_dropout,
    check_scale,
    check_tensors,
    is_number,
    layouts_of,
    shown,
)

_Pairs = list[tuple[Tensor, Tensor]]


class Numbers(NamedTuple):
    """Each adapter's own: lists, or tensors [n], which may be a compiler's, without numbers."""

    scales: Tensor | list[float]
    ranks: Tensor | list[int]
    dropouts: list[float]

    def as_tensors(self) -> tuple[Tensor, Tensor]:
        """Scales and ranks, on the CPU."""
        scales = torch.as_tensor(self.scales, dtype=torch.float64, device="cpu")
        return scales, torch.as_tensor(self.ranks, dtype=torch.int64, device="cpu")

    def as_mix(self, output: Output[Tensor]) -> Mix:
        """On the host.  Raises ValueError for a scale or a rank that no adapter can have."""
        scales, ranks = map(_on_host, self[:2])
        for i, (scale, rank, adapter) in enumerate(
            zip(scales, ranks, output.adapters, strict=True)
        ):
            check_scale(scale)
            most = adapter.lora_a.shape[0]
            if type(rank) is not int or not 1 <= rank <= most:
                raise ValueError(
                    f"ranks[{i}] is {shown(rank)}, but must be a whole number from 1 to {most}, "
                    "the rows of its lora_a"
                )
        (layout,) = layouts_of([output])
        return Mix(layout, tuple(scales), tuple(ranks), tuple(self.dropouts))


def _on_host(numbers: Tensor | list) -> list:
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers


def check_adapters(lora_a: Any, lora_b: Any) -> _Pairs:
    """Every adapter's tensors; banks are cut into views.

    Raises TypeError for what is neither banks nor lists, and ValueError for unlike numbers.
    """
    if isinstance(lora_a, Tensor) and isinstance(lora_b, Tensor):
        for name, bank, own in (("lora_a", lora_a, "r, K"), ("lora_b", lora_b, "N, r")):
            if bank.is_nested or bank.layout is not torch.strided or bank.dim() != 3:
                raise ValueError(
                    f"{name} has shape {tuple(bank.shape) if not bank.is_nested else 'nested'}, "
                    f"but a bank must be dense, [adapters, {own}]; or give a list of matrices"
                )
        lora_a, lora_b = lora_a.unbind(), lora_b.unbind()
    elif not (isinstance(lora_a, list | tuple) and isinstance(lora_b, list | tuple)):
        kinds = f"{type(lora_a).__name__} and {type(lora_b).__name__}"
        raise TypeError(
            f"lora_a and lora_b are {kinds}, but must both be banks, [adapters, r, K] and "
            "[adapters, N, r], or both lists of matrices"
        )
    if len(lora_a) != len(lora_b) or not lora_a:
        raise ValueError(
            f"lora_a has {len(lora_a)} adapters and lora_b {len(lora_b)}, but both must have the "
            "same number, at least 1"
        )
    return list(zip(lora_a, lora_b, strict=True))


def check_multi(
    x: Tensor,
    output: Output[Tensor],
    indices: Tensor | Sequence[int] | AdapterMapping,
    autocast: bool,
) -> None:
    """Raise ValueError or TypeError unless the tensors of all adapters, and the indices, fit x."""
    if x.is_nested:
        raise TypeError("x is nested, but must be one tensor: give each part by itself")
    base, (first, *others) = output
    check_call(x, [Output(base, (first,))], 0.0, True, autocast)
    out_features, features = base.weight.shape
    for i, adapter in enumerate(others, 1):
        # The base was looked at: lora_a has its place.
        check_tensors(x, x.device, Output(Base(first.lora_a), (adapter,)))
        shape, other = tuple(adapter.lora_a.shape), tuple(adapter.lora_b.shape)
        rank = shape[0] if shape else 0
        if not rank or shape != (rank, features) or other != (out_features, rank):
            raise ValueError(
                f"adapter {i} has lora_a {shape} and lora_b {other}, but x has {features} features "
                f"and weight {out_features} rows: they must be [r, {features}] and "
                f"[{out_features}, r], r at least 1"
            )
    _check_indices(x, len(output.adapters), indices)


def _check_indices(
    x: Tensor, adapters: int, indices: Tensor | Sequence[int] | AdapterMapping
) -> None:
    if isinstance(indices, AdapterMapping):
        shape = indices.shape
        if indices.adapters != adapters:
            raise ValueError(
                f"adapter_indices is a mapping of {indices.adapters} adapters, but there are "
                f"{adapters} in lora_a"
            )
    else:
        tensor = as_indices(indices)
        shape = tuple(tensor.shape)
        if isinstance(indices, Tensor) and tensor.device != x.device:
            raise ValueError(
                f"adapter_indices is on {tensor.device}, but x is on {x.device}: move them to one "
                "device, or share a fastlora.AdapterMapping"
            )
    if (not shape and x.dim() > 1) or shape != x.shape[:-1][: len(shape)]:
        raise ValueError(
            f"adapter_indices has shape {shape}, but x has {tuple(x.shape)}: it must have the "
            f"shape of x's first dimensions, {tuple(x.shape[:1])} (a sequence each) to "
            f"{tuple(x.shape[:-1])} (a row each)"
        )


def numbers_of(scales: Any, ranks: Any, dropout: Any, adapters: _Pairs) -> Numbers:
    """Raises TypeError and ValueError unless there is one of each for each adapter."""
    count = len(adapters)
    scales = _numbers("scales", scales, count, "alpha / r of each adapter")
    if isinstance(scales, Tensor) and scales.requires_grad:
        raise ValueError(
            "scales require a gradient, but are data: multiply lora_b by what you train"
        )
    if ranks is None:
        ranks = [lora_a.shape[0] for lora_a, _ in adapters]
    ranks = _numbers("ranks", ranks, count, "the rank of each adapter")
    if is_number(dropout):
        dropout = [dropout] * count
    dropouts = _on_host(_numbers("dropout", dropout, count, "a probability, or one each"))
    for p in dropouts:
        check_dropout(p)
    return Numbers(scales, ranks, dropouts)


def _numbers(name: str, values: Any, count: int, what: str) -> Tensor | list:
    if isinstance(values, Tensor):
        shape: Any = tuple(values.shape)
        fits, dense = shape == (count,), values.layout is torch.strided
        if fits and dense and not values.is_complex():
            return values
    elif isinstance(values, list | tuple):
        shape, fits = f"({len(values)},)", len(values) == count
        if fits:
            return list(values)
    else:
        raise TypeError(f"{name} must be a list or a tensor, {what}, not {shown(values)}")
    raise ValueError(
        f"{name} has shape {shape}, but there are {count} adapters: it must be [{count}], {what}"
    )
