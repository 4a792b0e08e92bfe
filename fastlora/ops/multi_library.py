"""The op of many adapters as ``torch.library`` has it, beside those of :mod:`.library`.

Scales and ranks are tensors there: other numbers in them recompile nothing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import find_backend
from ..mapping import Mix, shares_of
from ..projection import Output, flatten, unflatten
from .autocast import autocast_off
from .call import stand_in
from .library import LIBRARY, no_second_backward
from .multi_checks import Numbers
from .multi_function import MultiCall, kept_multi, layout_of, run_multi, run_multi_backward

_SETTINGS = (
    "Tensor order, Tensor ends, bool has_bias, Tensor scales, Tensor ranks, float[] dropouts, "
    "Tensor? seeds"
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
    has_bias = output.base.bias is not None
    layout = layout_of(Mix(has_bias, (1.0,) * len(dropouts), (), ()))
    op = torch.ops.fastlora.multi_lora_linear
    settings = (order, ends, has_bias, scales, ranks, list(map(float, dropouts)), seeds)
    return op(x, flatten([output], [layout]), *settings)[0]


def _call(x, tensors, order, ends, has_bias, scales, ranks, dropouts) -> MultiCall:
    (output,) = unflatten(tensors, [layout_of(Mix(has_bias, (1.0,) * len(dropouts), (), ()))])
    mix = Numbers(scales, ranks, dropouts).as_mix(output)
    return MultiCall(mix, len(order), shares_of(order, ends, x.device))


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
        else gradient
        for gradient, tensor, need in zip(found, inputs, needs, strict=True)
        if need
    ]


@torch.library.register_fake("fastlora::multi_lora_linear", lib=LIBRARY)
def _fake_multi_lora_linear(x, tensors, *settings):
    has_bias = settings[2]
    first = 2 if has_bias else 1
    width = max([lora_a.shape[0] for lora_a in tensors[first::2]])
    dtype = find_backend("torch").h_dtype(x.dtype, x.device)
    y = x.new_empty(*x.shape[:-1], tensors[0].shape[0])
    return y, x.new_empty(math.prod(x.shape[:-1]), width, dtype=dtype)


@torch.library.register_fake("fastlora::multi_lora_linear_backward", lib=LIBRARY)
def _fake_multi_lora_linear_backward(dy, x, tensors, h, needs, *settings):
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip([x, *tensors], needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    x, tensors, order, ends, has_bias, scales, ranks, dropouts, seeds = inputs
    needs = [tensor.requires_grad for tensor in (x, *tensors)]
    mix = Mix(has_bias, (1.0,) * len(dropouts), (), ())
    kept_x, kept_h = kept_multi(x, output[1], needs, mix)
    ctx.save_for_backward(kept_x, kept_h, order, ends, scales, ranks, seeds, *tensors)
    ctx.has_bias, ctx.dropouts, ctx.shape = has_bias, dropouts, x.shape


def _backward(ctx, dy, _):
    x, h, order, ends, scales, ranks, seeds, *tensors = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    x = stand_in(tensors[0], ctx.shape) if x is None else x
    h = x.new_empty(math.prod(ctx.shape[:-1]), 0) if h is None else h
    op = torch.ops.fastlora.multi_lora_linear_backward
    settings = (order, ends, ctx.has_bias, scales, ranks, ctx.dropouts, seeds)
    asked = iter(op(dy, x, tensors, h, needs, *settings))
    dx, *gradients = [next(asked) if need else None for need in needs]
    return dx, gradients, None, None, None, None, None, None, None


torch.library.register_autograd(
    "fastlora::multi_lora_linear", _backward, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "fastlora::multi_lora_linear_backward", no_second_backward, lib=LIBRARY
)
