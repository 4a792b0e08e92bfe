"""The checks of a call, for layers, experts and many adapters.

A call with a cached key skips them (:mod:`fastlora.ops.kinds`).  Therefore everything that a check
reads must be part of the key: a property of a tensor in ``facts_of``, anything else in ``key_of``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..common.text import shown
from ..common.values import check_dropout, check_scale, check_switches, is_number
from ..formats.format import Quantized
from .projection import AUTOCAST_DTYPES, DTYPES, Adapter, Base, Output, is_plain, named_tensors
from .rows import AdapterMapping, Numbers, as_indices, as_list

_DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def check_call(
    x: Tensor,
    outputs: Sequence[Output],
    dropout: float,
    training: bool,
    autocast: bool,
    offsets: Tensor | None = None,
) -> None:
    """Raise ValueError or TypeError unless the tensors of every output fit x.

    x must be a tensor; it may be nested.  ``autocast``: whether x and the weights will be cast, so
    that their dtypes may differ.  With ``offsets``, x holds the sorted rows of experts, and the
    tensors of an output are stacked, with experts as their first dimension.
    """
    check_x(x)
    if offsets is not None and x.is_nested:
        raise TypeError("x is nested, but must be [rows, in_features]: give it as one matrix")
    if offsets is not None and x.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but must be [rows, in_features], sorted by expert"
        )
    if x.dim() == 0:
        raise ValueError(
            "x is a scalar, but must be [..., in_features]: give it at least one dimension"
        )
    check_dropout(dropout)
    if training is not True:
        check_switches(training=training)
    if not outputs:
        raise ValueError("no projections came: give at least one fastlora.Projection")
    features = _features_of_nested(x) if x.is_nested else x.shape[-1]
    dtype, device, stacked = x.dtype, x.device, offsets is not None
    for output in outputs:
        check_tensors(x, device, output)
        weight = output.base.weight
        _check_base(features, dtype, autocast, output, stacked)
        for adapter in output.adapters:
            _check_adapter(features, weight.size(), adapter)
            check_scale(adapter.scale)
        if offsets is not None:
            # After _check_base: the weight is [E, N, K], with E experts.
            _check_ends(x, weight.size()[0], offsets)


def check_x(x: Tensor) -> None:
    """Raise TypeError if x has an unsupported dtype or layout; x may be nested."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}, but must have one of {_DTYPE_NAMES}: convert it")
    if x.layout is not torch.strided and not x.is_nested:
        raise TypeError(f"x has layout {x.layout}, but must be dense: call x.to_dense()")


def check_tensor(name: str, tensor: object, x: Tensor | None = None) -> None:
    """Raise TypeError if ``tensor`` is no tensor, and ValueError if it is uninitialized (lazy).

    With a plain ``x`` also TypeError for a FakeTensor, which is a null pointer for kernels.  torch
    may accept other classes beside x.
    """
    if not isinstance(tensor, Tensor):
        expected = "a tensor or None" if name == "bias" else "a tensor"
        raise TypeError(f"{name} must be {expected}, not {type(tensor).__name__}")
    if is_lazy(tensor):
        raise ValueError(f"{name} has no shape yet: call its lazy module once to initialize it")
    if x is not None and type(tensor).__name__ == "FakeTensor" and is_plain(x):
        raise TypeError(why_not_mixed(name, tensor, x))


def why_not_mixed(name: str, tensor: Tensor, x: Tensor) -> str:
    """Why torch can't combine x with a tensor of this class; "" if it can."""
    if _dispatches(tensor) == _dispatches(x):
        return ""
    return (
        f"{name} is a {type(tensor).__name__}, but x is a {type(x).__name__}, and torch doesn't "
        "mix them: make both the same"
    )


def _dispatches(tensor: Tensor) -> bool:
    """Whether its class implements torch's operations itself, e.g. FakeTensor or DTensor."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_tensors(x: Tensor, device: torch.device, output: Output) -> None:
    """Raise unless an output's tensors are dense, of a supported dtype, and on x's device.

    The errors are ValueError and TypeError.
    """
    if isinstance(output.base.weight, Quantized):
        _check_packed(x, device, output.base.weight)
    for name, tensor in named_tensors(output):
        if tensor is None:
            # Only a bias may be None.  For other names, check_tensor raises.
            if name != "bias":
                check_tensor(name, tensor)
            continue
        if not is_plain(tensor):
            # A plain tensor has data, so only other classes may be lazy or fake.
            check_tensor(name, tensor, x)
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device}, but x is on {device}: move them to one device"
            )
        if tensor.layout is not torch.strided or tensor.is_nested:
            if tensor.is_nested:
                raise TypeError(f"{name} is nested, but only x may be: call this for each part")
            raise TypeError(
                f"{name} has layout {tensor.layout}, but must be dense: call {name}.to_dense()"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, but must have one of {_DTYPE_NAMES}: convert it"
            )


def _check_packed(x: Tensor, device: torch.device, weight: Quantized) -> None:
    """Raise unless a packed weight's tensors fit its format, and are on x's device and frozen."""
    if x.is_nested:
        raise TypeError("x is nested, but a packed weight needs a dense x: call this for each part")
    for tensor in weight.tensors:
        if not is_plain(tensor):
            check_tensor("a packed weight", tensor)
        if tensor.device != device:
            raise ValueError(
                f"a packed weight is on {tensor.device}, but x is on {device}: move them to one "
                "device"
            )
        if tensor.requires_grad:
            raise ValueError("a packed weight requires a gradient, but can't be trained: freeze it")
    try:
        weight.check()
    except ValueError as error:
        raise ValueError(f"weight is not valid {weight.format.label}: {error}") from error


def _features_of_nested(x: Tensor) -> int:
    try:
        return x.size(-1)
    except RuntimeError:
        raise ValueError(
            "x is nested, but its parts differ in their last size: all must have in_features"
        ) from None


def _check_base(
    features: int, dtype: torch.dtype, autocast: bool, output: Output, stacked: bool
) -> None:
    (weight, bias), adapters = output
    # A packed weight is unpacked in the dtype of x.
    fits = isinstance(weight, Quantized) or weight.dtype == dtype
    if not fits and not (autocast and dtype in AUTOCAST_DTYPES and weight.dtype in AUTOCAST_DTYPES):
        raise TypeError(
            f"weight has dtype {weight.dtype}, but x has {dtype}: convert one of them, "
            "or use torch.autocast"
        )
    shape = weight.size()
    # [N, K]; with experts (stacked), [E, N, K].
    if len(shape) != 2 + stacked or shape[-1] != features or (stacked and 0 in shape):
        lead, rest = ("experts, ", ", each at least 1") if stacked else ("", "")
        raise ValueError(
            f"weight has shape {tuple(shape)}, but x has {features} features: "
            f"weight must be [{lead}out_features, {features}]{rest}"
        )
    # With an adapter, _check_adapter reports a size of 0.
    if not adapters and 0 in shape:
        raise ValueError(f"weight has shape {tuple(shape)}, but each size must be at least 1")
    if bias is not None and bias.shape != shape[:-1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, but weight has shape {tuple(shape)}: "
            f"bias must be {list(shape[:-1])}"
        )


def _check_adapter(features: int, weight: Sequence[int], adapter: Adapter, name: str = "") -> None:
    """``weight``: its shape.  ``name``: a prefix for errors, such as "adapter 2: "."""
    lora_a, lora_b, _ = adapter
    # lead: [E] for experts, else [].
    *lead, out_features, _ = weight
    shape = tuple(lora_a.shape)
    # A vector has no rank.  With 0 here, the comparison of shapes below fails.
    rank = shape[-2] if len(shape) > 1 else 0
    owners = f"there are {lead[0]} experts, and " if lead else ""
    if shape != (*lead, rank, features):
        raise ValueError(
            f"{name}lora_a has shape {shape}, but {owners}x has {features} features: lora_a must "
            f"be [{', '.join([*map(str, lead), 'r', str(features)])}]"
        )
    expected = [*lead, out_features, rank]
    if list(lora_b.shape) != expected:
        raise ValueError(
            f"{name}lora_b has shape {tuple(lora_b.shape)}, but {owners}weight has {out_features} "
            f"rows and lora_a {rank}: lora_b must be {expected}"
        )
    if features == 0 or out_features == 0 or rank == 0:
        raise ValueError(
            f"{name}in_features {features}, out_features {out_features} and r {rank} must each be "
            "at least 1: for no adapter use torch.nn.functional.linear"
        )


def _check_ends(x: Tensor, experts: int, ends: Tensor) -> None:
    if not is_plain(ends):
        check_tensor("offsets", ends, x)
    if ends.dtype != torch.int32 or ends.layout is not torch.strided or ends.is_nested:
        raise TypeError(
            f"offsets has dtype {ends.dtype} and layout {ends.layout}, but must be dense and "
            "int32, as for torch.nn.functional.grouped_mm: call offsets.to(torch.int32)"
        )
    if ends.shape != (experts,):
        raise ValueError(
            f"offsets has shape {tuple(ends.shape)}, but there are {experts} experts: offsets must "
            f"be [{experts}], the end of each one's rows"
        )
    if ends.device != x.device:
        raise ValueError(
            f"offsets is on {ends.device}, but x is on {x.device}: move them to one device"
        )


def check_many(
    x: Tensor,
    output: Output[Tensor],
    indices: Tensor | Sequence[int] | AdapterMapping,
    training: bool,
    autocast: bool,
) -> None:
    """Raise ValueError or TypeError unless all adapters' tensors and the indices fit x."""
    if x.is_nested:
        raise TypeError("x is nested, but must be one dense tensor: call this for each part")
    base, adapters = output
    # The dropouts have checks of their own, in numbers_of.
    check_call(x, [Output(base, adapters[:1])], 0.0, training, autocast)
    for i, adapter in enumerate(adapters[1:], 1):
        # check_call checked the base.  lora_a takes its place here, because an Output needs one.
        check_tensors(x, x.device, Output(Base(adapters[0].lora_a), (adapter,)))
        _check_adapter(x.shape[-1], base.weight.size(), adapter, f"adapter {i}: ")
    _check_indices(x, len(adapters), indices)


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
    # The shape must be a prefix of x's leading dimensions; a single index fits only a vector x.
    if (not shape and x.dim() > 1) or shape != x.shape[:-1][: len(shape)]:
        raise ValueError(
            f"adapter_indices has shape {shape}, but x has {tuple(x.shape)}: it must have the "
            f"shape of x's first dimensions, {tuple(x.shape[:1])} (a sequence each) to "
            f"{tuple(x.shape[:-1])} (a row each)"
        )


def adapters_of(lora_a: Any, lora_b: Any) -> tuple[Adapter[Tensor], ...]:
    """The tensors of each adapter; banks are split into views.

    Raises TypeError unless both arguments are banks or both are lists, and ValueError if their
    numbers of adapters differ.
    """
    if isinstance(lora_a, Tensor) and isinstance(lora_b, Tensor):
        for name, bank, dims in (("lora_a", lora_a, "r, K"), ("lora_b", lora_b, "N, r")):
            if bank.is_nested or bank.layout is not torch.strided or bank.dim() != 3:
                raise ValueError(
                    f"{name} has shape {tuple(bank.shape) if not bank.is_nested else 'nested'}, "
                    f"but a bank must be dense, [adapters, {dims}]; or give a list of matrices"
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
    return tuple([Adapter(a, b) for a, b in zip(lora_a, lora_b, strict=True)])


def numbers_of(
    scales: Any, ranks: Any, dropout: Any, adapters: Sequence[Adapter[Tensor]]
) -> Numbers:
    """One scale, rank and dropout for each adapter, checked.

    ``ranks`` None means the ranks of the tensors.  One ``dropout`` serves all adapters.  Raises
    TypeError or ValueError for values of other classes, numbers or sizes.
    """
    count = len(adapters)
    # Numbers.on_host checks the values of scales and ranks, which a compiled call can't read.
    scales = _numbers("scales", scales, count, "alpha / r of each adapter")
    if isinstance(scales, Tensor) and scales.requires_grad:
        raise ValueError(
            "scales require a gradient, but can't be trained: multiply lora_b by your parameter"
        )
    if ranks is None:
        ranks = [adapter.lora_a.shape[0] for adapter in adapters]
    ranks = _numbers("ranks", ranks, count, "the rank of each adapter")
    if is_number(dropout):
        dropout = [dropout] * count
    dropouts = as_list(_numbers("dropout", dropout, count, "a probability for each adapter"))
    for p in dropouts:
        check_dropout(p)
    return Numbers(scales, ranks, dropouts)


def _numbers(name: str, values: Any, count: int, what: str) -> Tensor | list:
    if isinstance(values, Tensor):
        dense = values.layout is torch.strided
        if values.shape == (count,) and dense and not values.is_complex():
            return values
        shape = f"{tuple(values.shape)} ({values.dtype}, {values.layout})"
    elif isinstance(values, list | tuple):
        if len(values) == count:
            return list(values)
        shape = f"({len(values)},)"
    else:
        raise TypeError(f"{name} must be a list or a tensor, {what}, not {shown(values)}")
    raise ValueError(
        f"{name} has shape {shape}, but there are {count} adapters: it must be [{count}], {what}"
    )
