"""The op of many adapters as ``torch.library`` has it, beside those of :mod:`.library`.

Scales and ranks are tensors there: other numbers in them recompile nothing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import find_backend
from ..formats.format import from_text
from ..mapping import sorted_on
from ..projection import Layout, Output, flatten, layouts_of, unflatten
from .autocast import autocast_off
from .call import stand_in
from .library import LIBRARY, no_second_backward
from .multi_checks import Numbers
from .multi_function import MultiCall, kept_multi, run_multi, run_multi_backward

_SETTINGS = (
    "Tensor order, Tensor ends, bool has_bias, str format, Tensor scales, Tensor ranks, "
    "float[] dropouts, Tensor? seeds"
)
LIBRARY.define(
    f"multi_lora_linear(Tensor x, Tensor[] tensors, {_SETTINGS}) -> (Tensor y, Tensor h)"
)
LIBRARY.define(
    "multi_lora_linear_backward(Tensor dy, Tensor x, Tensor[] tensors, Tensor h, bool[] needs, "
    f"{_SETTINGS}) -> Tensor[]"
)


def call_registered(
    x: Tensor,
    output: Output[Tensor],
    order: Tensor,
    ends: Tensor,
    scales: Tensor,
    ranks: Tensor,
    dropouts: Sequence[float],
    seeds: Tensor | None,
) -> Tensor:
    """y, by way of the dispatcher; scales float64 [n] and ranks int64 [n] are on the CPU."""
    (layout,) = layouts_of([output])
    format = "" if layout.format is None else layout.format.text
    op = torch.ops.fastlora.multi_lora_linear
    numbers = (scales, ranks, list(map(float, dropouts)))
    settings = (order, ends, layout.has_bias, format, *numbers, seeds)
    return op(x, flatten([output], [layout]), *settings)[0]


def _layout(has_bias: bool, format: str, count: int) -> Layout:
    return Layout(has_bias, (1.0,) * count, from_text(format) if format else None)


def _call(x, tensors, order, ends, has_bias, format, scales, ranks, dropouts) -> MultiCall:
    (output,) = unflatten(tensors, [_layout(has_bias, format, len(dropouts))])
    mix = Numbers(scales, ranks, dropouts).as_mix(output)
    return MultiCall(mix, sorted_on(order, ends, x.device), find_backend(device=x.device))


@torch.library.impl(LIBRARY, "multi_lora_linear", "CompositeExplicitAutograd")
def _multi_lora_linear(x, tensors, *settings):
    *settings, seeds = settings
    with autocast_off(x.device.type):
        return run_multi([x, *tensors], seeds, _call(x, tensors, *settings))


@torch.library.impl(LIBRARY, "multi_lora_linear_backward", "CompositeExplicitAutograd")
def _multi_lora_linear_backward(dy, x, tensors, h, needs, *settings):
    *settings, seeds = settings
    inputs = [x, *tensors]
    found = run_multi_backward(dy, inputs, h, needs, seeds, _call(x, tensors, *settings))
    return [
        torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        if gradient is None
        else _alone(gradient)
        for gradient, tensor, need in zip(found, inputs, needs, strict=True)
        if need
    ]


def _alone(gradient: Tensor) -> Tensor:
    """In memory of its own: what an op returns may not lie in another's."""
    shares = gradient.untyped_storage().nbytes() > gradient.nbytes
    return gradient.clone() if shares else gradient


@torch.library.register_fake("fastlora::multi_lora_linear", lib=LIBRARY)
def _fake_multi_lora_linear(
    x, tensors, order, ends, has_bias, format, scales, ranks, dropouts, seeds
):
    (output,) = unflatten(tensors, [_layout(has_bias, format, len(dropouts))])
    width = max([adapter.lora_a.shape[0] for adapter in output.adapters])
    dtype = find_backend(device=x.device).h_dtype(x.dtype, x.device)
    y = x.new_empty(*x.shape[:-1], output.base.weight.shape[0])
    return y, x.new_empty(math.prod(x.shape[:-1]), width, dtype=dtype)


@torch.library.register_fake("fastlora::multi_lora_linear_backward", lib=LIBRARY)
def _fake_multi_lora_linear_backward(dy, x, tensors, h, needs, *settings):
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip([x, *tensors], needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    x, tensors, order, ends, has_bias, format, scales, ranks, dropouts, seeds = inputs
    needs = [tensor.requires_grad for tensor in (x, *tensors)]
    kept_x, kept_h = kept_multi(x, output[1], needs, _layout(has_bias, format, len(dropouts)))
    ctx.save_for_backward(kept_x, kept_h, order, ends, scales, ranks, seeds, *tensors)
    ctx.has_bias, ctx.format, ctx.dropouts = has_bias, format, dropouts
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _backward(ctx, dy, _):
    x, h, order, ends, scales, ranks, seeds, *tensors = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    x = stand_in(tensors[0], ctx.shape, ctx.dtype) if x is None else x
    h = x.new_empty(math.prod(ctx.shape[:-1]), 0) if h is None else h
    op = torch.ops.fastlora.multi_lora_linear_backward
    settings = (order, ends, ctx.has_bias, ctx.format, scales, ranks, ctx.dropouts, seeds)
    asked = iter(op(dy, x, tensors, h, needs, *settings))
    dx, *gradients = [next(asked) if need else None for need in needs]
    return dx, gradients, None, None, None, None, None, None, None, None


torch.library.register_autograd(
    "fastlora::multi_lora_linear", _backward, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "fastlora::multi_lora_linear_backward", no_second_backward, lib=LIBRARY
)
