"""One call with many adapters: what the autograd node and the registered op share, and the node."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backends import Backend
from ..mapping import Mix, Sorted
from ..projection import Layout, flatten, unflatten
from .autocast import autocast_off
from .call import are_batched, as_matrix, gradients_of, stand_in
from .function import cast_output

_ARGUMENTS = 2  # seeds and the call, before the inputs


class MultiCall(NamedTuple):
    """What a call is besides its tensors."""

    mix: Mix
    batch: Sorted
    backend: Backend
    banks: bool = False  # whether the adapters' tensors are views of two banks, by unbind


def run_multi(
    inputs: Sequence[Tensor], seeds: Tensor | None, call: MultiCall
) -> tuple[Tensor, Tensor]:
    """y [..., N] and h [M, r].  ``inputs``: x [..., K], and the output's tensors, laid flat."""
    x, *tensors = inputs
    (output,) = unflatten(tensors, [call.mix.layout])
    y, h = call.backend.forward_multi(as_matrix(x), output, call.batch, call.mix, seeds)
    # Resized, not viewed: autograd forbids in-place changes of a view that a Function returns.
    return (y if x.dim() == 2 else y.resize_(*x.shape[:-1], y.shape[-1])), h


def run_multi_backward(
    dy: Tensor,
    inputs: Sequence[Tensor],
    h: Tensor,
    needs: Sequence[bool],
    seeds: Tensor | None,
    call: MultiCall,
) -> list[Tensor | None]:
    """The gradient of each input that needs one; None for others, and an adapter without rows."""
    x, *tensors = inputs
    layouts = [call.mix.layout]
    (output,), (wanted,) = unflatten(tensors, layouts), unflatten(needs[1:], layouts)
    with autocast_off(x.device.type):
        dx, gradients = call.backend.backward_multi(
            as_matrix(dy), as_matrix(x), output, call.batch, call.mix, h, needs[0], wanted, seeds
        )
    return [None if dx is None else dx.view(x.shape), *flatten([gradients], layouts)]


def kept_multi(
    x: Tensor, h: Tensor, needs: Sequence[bool], layout: Layout
) -> tuple[Tensor | None, Tensor | None]:
    """What the backward will read of x and h: x if an adapter or the weight needs a gradient."""
    (wanted,) = unflatten(needs[1:], [layout])
    reads_h = any([adapter.lora_b for adapter in wanted.adapters])
    reads_x = reads_h or wanted.base.weight or any([a.lora_a for a in wanted.adapters])
    return x if reads_x else None, h if reads_h else None


class MultiLoRAFunction(torch.autograd.Function):
    """One node for all adapters.  It saves the inputs, the seeds and h, as far as they are read."""

    @staticmethod
    def forward(ctx, seeds: Tensor | None, call: MultiCall, *inputs: Tensor) -> Tensor:
        """``inputs``: x, and the output's tensors, laid flat: what autograd follows."""
        y, h = run_multi(inputs, seeds, call)
        x, *tensors = inputs
        kept_x, kept_h = kept_multi(x, h, ctx.needs_input_grad[_ARGUMENTS:], call.mix.layout)
        ctx.save_for_backward(seeds, kept_x, *tensors, kept_h)
        ctx.call, ctx.shape, ctx.dtype = call, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[_ARGUMENTS:]
        if dy is None:
            return (None,) * (_ARGUMENTS + len(needs))
        seeds, x, *tensors, h = ctx.saved_tensors
        x = stand_in(tensors[0], ctx.shape, ctx.dtype) if x is None else x
        if torch.is_grad_enabled() or are_batched([dy]):
            gradients = _differentiable(dy, [x, *tensors], needs, seeds, call)
        else:
            h = x.new_empty(x.numel() // x.shape[-1], 0) if h is None else h
            gradients = run_multi_backward(dy, [x, *tensors], h, needs, seeds, call)
        if call.banks:
            gradients = _with_zeros(gradients, [x, *tensors], needs)
        return None, None, *gradients


def _with_zeros(
    gradients: list[Tensor | None], inputs: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Zeros for the last adapter if it has none: without any, unbind gives its bank no gradient."""
    last = [
        tensor.new_zeros(()).expand_as(tensor) if need and gradient is None else gradient
        for gradient, tensor, need in zip(gradients[-2:], inputs[-2:], needs[-2:], strict=True)
    ]
    return [*gradients[:-2], *last]


def _differentiable(
    dy: Tensor,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    seeds: Tensor | None,
    call: MultiCall,
) -> list[Tensor | None]:
    """The backward's gradients by torch's own operations: autograd's, of the textbook formula."""
    create_graph = torch.is_grad_enabled()
    mix = call.mix
    with torch.enable_grad():
        # Views, since one tensor may be there twice, and each time has a gradient of its own.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        x, *tensors = inputs
        if not needs[0]:
            x = inputs[0] = x.detach()
        output = cast_output(unflatten(tensors, [mix.layout])[0], x.dtype)
        count = len(call.batch.order)
        indices = torch.full((count,), -1, device=x.device)
        masks: list[Tensor | None] = [None] * len(mix.scales)
        for adapter, items, place in call.batch.shares:
            indices[items] = adapter
            if seeds is not None and mix.dropouts[adapter]:
                rows = (place.stop - place.start) * (x.numel() // x.shape[-1] // count)
                shape, p = (rows, x.shape[-1]), mix.dropouts[adapter]
                masks[adapter] = call.backend.dropout_mask(seeds[adapter], shape, p)
        y = reference.multi_lora_linear(
            x,
            output.base.weight,
            [adapter.lora_a for adapter in output.adapters],
            [adapter.lora_b for adapter in output.adapters],
            indices,
            bias=output.base.bias,
            scales=mix.scales,
            ranks=mix.ranks,
            # One without rows has no mask.
            dropouts=[0.0 if m is None else p for m, p in zip(masks, mix.dropouts, strict=True)],
            masks=masks,
        )
    if not y.requires_grad:
        return [None] * len(inputs)
    return gradients_of([y], inputs, needs, [dy], create_graph)
