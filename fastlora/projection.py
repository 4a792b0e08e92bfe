"""One projection of a group: the frozen base and its adapter.  Plain data, and the checks of it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
_LARGEST = torch.finfo(torch.float32).max
_TENSORS = ("weight", "lora_a", "lora_b", "bias")


class Projection(NamedTuple):
    """A frozen linear layer with an adapter: x weightᵀ + scale · drop(x) lora_aᵀ lora_bᵀ + bias.

    With in_features K, out_features N and rank r:

    * ``weight`` [N, K], in the dtype of x;
    * ``lora_a`` [r, K], ``lora_b`` [N, r] and ``bias`` [N] (or None), in any of the four floating
      dtypes: they are cast as they are read;
    * ``scale``, a finite number: alpha / r, or alpha / √r for rsLoRA.

    ``weight`` None makes it one more adapter of the layer before it in a list: what it computes is
    added to that layer's output, and it has no bias.

    It checks nothing itself: :func:`fastlora.lora_linears` does, when it meets x.
    """

    weight: Any  # a Tensor or None
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None = None
    scale: float = 1.0


def group(tensors: Sequence[Any], scales: Sequence[float]) -> list[Projection]:
    """Four tensors a projection, laid end to end, as projections."""
    return [Projection._make([*tensors[4 * i : 4 * i + 4], s]) for i, s in enumerate(scales)]


def outputs_of(projections: Sequence[Projection]) -> list[int]:
    """For each projection, which of the group's outputs it is part of."""
    return [n - 1 for n in accumulate(projection.weight is not None for projection in projections)]


def check_types(x: Tensor, projections: Sequence[Projection]) -> None:
    """Raise TypeError unless these are a tensor and a list of projections that hold tensors."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    if not isinstance(projections, list | tuple):
        raise TypeError(f"projections must be a list, not {type(projections).__name__}")
    for i, projection in enumerate(projections):
        if type(projection) is not Projection:
            raise TypeError(
                f"projections has a {type(projection).__name__}, but must be a list of "
                "fastlora.Projection"
            )
        weight, lora_a, lora_b, bias, _ = projection
        for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
            if tensor is weight is None and i > 0:
                if bias is not None:
                    raise ValueError("a projection without a weight of its own can't have a bias")
            elif not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a tensor or None, not {type(bias).__name__}")


def check_call(x: Tensor, projections: Sequence[Projection], dropout: float) -> None:
    """Raise ValueError or TypeError unless every projection fits x; check_types comes first."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}, but must have one of {_DTYPE_NAMES}: convert it")
    if x.layout is not torch.strided:
        raise TypeError(f"x has layout {x.layout}, but must be dense: call x.to_dense()")
    if x.dim() == 0:
        raise ValueError(
            "x is a scalar, but must be [..., in_features]: give it at least one dimension"
        )
    check_dropout(dropout)
    if not projections:
        raise ValueError("no projections came: give at least one fastlora.Projection")
    features, dtype, device = x.shape[-1], x.dtype, x.device
    base = None
    for projection in projections:
        if projection.weight is not None:
            base = projection.weight
        _check_dtypes_and_devices(dtype, device, projection)
        _check_shapes(features, projection._replace(weight=base))


def check_dropout(dropout: float) -> None:
    """Raise ValueError for what is no probability below 1."""
    if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise ValueError(
            f"dropout is {dropout!r}, but must lie in [0, 1): the probability of dropping an input"
        )


def check_adapter(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raise ValueError for numbers that no adapter can have."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r is {r!r}, but the rank must be a whole number of at least 1")
    if (
        isinstance(lora_alpha, bool)
        or not isinstance(lora_alpha, (int, float))
        or not -_LARGEST <= lora_alpha <= _LARGEST
    ):
        raise ValueError(
            f"lora_alpha is {lora_alpha!r}, but must be a finite number: scaling is lora_alpha / r"
        )
    check_dropout(lora_dropout)


def _check_shapes(features: int, projection: Projection) -> None:
    weight, lora_a, lora_b, bias, scale = projection
    weight_shape, lora_a_shape = weight.shape, lora_a.shape
    if len(weight_shape) != 2 or weight_shape[1] != features:
        raise ValueError(
            f"weight has shape {tuple(weight_shape)}, but x has {features} features: "
            f"weight must be [out_features, {features}]"
        )
    if len(lora_a_shape) != 2 or lora_a_shape[1] != features:
        raise ValueError(
            f"lora_a has shape {tuple(lora_a_shape)}, but x has {features} features: "
            f"lora_a must be [r, {features}]"
        )
    out_features, rank = weight_shape[0], lora_a_shape[0]
    if lora_b.shape != (out_features, rank):
        raise ValueError(
            f"lora_b has shape {tuple(lora_b.shape)}, but weight has {out_features} rows and "
            f"lora_a {rank}: lora_b must be [{out_features}, {rank}]"
        )
    if features == 0 or out_features == 0 or rank == 0:
        raise ValueError(
            f"in_features {features}, out_features {out_features} and r {rank} must each be at "
            "least 1: for no adapter use torch.nn.functional.linear"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, but weight has {out_features} rows: "
            f"bias must be [{out_features}]"
        )
    if not isinstance(scale, (int, float)) or not -_LARGEST <= scale <= _LARGEST:  # false for NaN
        raise ValueError(
            f"scale is {scale!r}, but must be a finite float32: alpha / r, or alpha / √r for rsLoRA"
        )


def _check_dtypes_and_devices(
    dtype: torch.dtype, device: torch.device, projection: Projection
) -> None:
    for name, tensor in zip(_TENSORS, projection[:4], strict=True):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device}, but x is on {device}: move them to one device"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}, but must have one of {_DTYPE_NAMES}")
    if projection.weight is not None and projection.weight.dtype != dtype:
        raise TypeError(
            f"weight has dtype {projection.weight.dtype}, but x has {dtype}: convert one of them, "
            "or use torch.autocast"
        )
