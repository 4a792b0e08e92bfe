"""A gated MLP, down(act(gate(x)) ∘ up(x)), whose product is made again in the backward.

It is two nodes of autograd, one behind the other: gate and up are the group of :mod:`.node`,
and the rest, from these two on, is the node of this file.  Besides the parameters they keep x and
what the layers keep (every h, seeds), gate and up, and neither act(gate) nor the product.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from ..backends import Call, find_backend
from ..backends.gated import ACTIVATIONS
from ..checks import check_call
from ..projection import Output, flatten, layouts_of
from .dispatch import autocast_inputs, autocast_is_on, autocast_off
from .kinds import call_of, key_of_outputs, remember
from .node import (
    Function,
    LoRALinearFunction,
    are_batched,
    as_matrix,
    followed,
    gradients_of,
    run_backward,
    run_forward,
    stand_in,
    to_save,
)
from .run import draw_seed

_ARGUMENTS = 4  # activation, wide, seeds and call, before the inputs


def gated_mlp(
    x: Tensor,
    gate: Output[Tensor],
    up: Output[Tensor],
    down: Output[Tensor],
    activation: str,
    *,
    dropout: float = 0.0,
    down_dropout: float = 0.0,
    wide: bool = False,
) -> Tensor:
    """y = down(act(gate(x)) ∘ up(x)) for an x that :func:`fastlora.ops.dispatch.follows`, [..., N].

    x is [..., K], gate and up are [I, K], down is [N, I]; dtypes are those of
    :func:`fastlora.lora_linear`.  ``activation`` is silu, gelu, gelu_tanh, relu or relu2.
    ``dropout`` is that of gate's and up's adapters, ``down_dropout`` that of down's.  The masks are
    those of three calls of one layer each, gate, up, down.  Gradients of gradients are right, and
    not fast.

    Weights may be packed, some or all: no dense copy of one outlives a product.  ``wide``: of an x
    of 16 bits, for layers that give float32: the activation, the product and their gradients are
    float32, of which only what is rounded for the next product is kept.

    Raises ValueError and TypeError as :func:`fastlora.lora_linear`, and ValueError for an unknown
    activation, or if gate and up aren't of one size.
    """
    return gated_call(x, gate, up, down, activation, dropout, down_dropout, wide)[0]


class GatedCall(NamedTuple):
    """What a call is besides its tensors."""

    first: Call  # of gate and up
    last: Call  # of down
    split: int  # so many tensors are gate's and up's, and come first
    activation: str
    wide: bool


def gated_call(
    x: Tensor,
    gate: Output[Tensor],
    up: Output[Tensor],
    down: Output[Tensor],
    activation: str,
    dropout: float,
    down_dropout: float,
    wide: bool,
) -> tuple[Tensor, GatedCall | None]:
    """As :func:`gated_mlp`; and what a call of this kind is, for :func:`run_gated`, if no cast was
    needed."""
    rates = dropout, type(dropout), down_dropout, type(down_dropout)
    key, inputs = key_of_outputs(x, (gate, up, down), (GatedCall, *rates, activation, wide))
    known = call_of(key)
    if known is not None:
        return run_gated(inputs, known), known
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation is {activation!r}, but must be one of {known}")
    device = x.device.type
    autocast = autocast_is_on(device)
    check_call(x, (gate, up), dropout, True, autocast)
    if gate.base.weight.shape != up.base.weight.shape:
        shapes = [tuple(output.base.weight.shape) for output in (gate, up)]
        raise ValueError(f"gate and up have weights of shapes {shapes[0]} and {shapes[1]}")
    weight = gate.base.weight  # of no rows: what down would be called with
    hidden = weight.T if isinstance(weight, Tensor) else x.new_empty(0, weight.shape[0])
    check_call(hidden, (down,), down_dropout, True, autocast)
    if autocast:
        x, (gate, up, down) = autocast_inputs(x, (gate, up, down))
    backend = find_backend(device=x.device)
    captures = key is not None and not autocast
    calls = []
    for outputs, p in (((gate, up), dropout), ((down,), down_dropout)):
        adapted = any([output.adapters for output in outputs])
        captured: dict | None = {} if captures else None
        calls.append(Call(layouts_of(outputs), p if adapted else 0.0, backend, captured=captured))
    first, last = calls
    tensors = flatten((gate, up), first.layouts)
    call = GatedCall(first, last, len(tensors), activation, wide)
    inputs = [x, *tensors, *flatten((down,), last.layouts)]
    with autocast_off(device):
        # It may be that some have outlived a transform of torch.func.
        y = run_gated(unwrap_dead_wrappers(tuple(inputs)), call)
    if captures:
        remember(None, key, call)
    return y, call if captures else None


def run_gated(inputs: Sequence[Tensor], call: GatedCall) -> Tensor:
    """y of a call that passed the checks: x, and the tensors of gate, up and down, laid flat."""
    first, last, split, activation, wide = call
    x = inputs[0]
    seeds, down_seeds = _seeds(x, first), _seeds(x, last)
    hidden = LoRALinearFunction.apply(seeds, None, first, *inputs[: 1 + split])
    rest = inputs[1 + split :]
    return GatedLinearFunction.apply(activation, wide, down_seeds, last, *hidden, *rest)


def _seeds(x: Tensor, call: Call) -> Tensor | None:
    """As so many layers draw them: on a GPU one draw of two numbers isn't two draws of one."""
    counts = [len(layout.scales) for layout in call.layouts if layout.scales]
    if not call.dropout or not counts:
        return None
    return torch.cat([draw_seed(count, x.device) for count in counts])


class GatedLinearFunction(Function):
    """One output of act(gate) ∘ up, which isn't kept.  It saves gate, up, its tensors and every h.

    An h is left out if its lora_b needs no gradient.
    """

    @staticmethod
    def forward(
        ctx,
        activation: str,
        wide: bool,
        seeds: Tensor | None,
        call: Call,
        gate: Tensor,
        up: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        product = call.backend.gated(as_matrix(gate), as_matrix(up), activation, wide)
        (y,), hs = run_forward([product, *tensors], seeds, call)
        if gate.dim() != 2:
            y.resize_(*gate.shape[:-1], y.shape[-1])
        needs = _needs(ctx)
        saved_product, saved_hs = to_save(product, hs, needs, call.layouts)
        ctx.save_for_backward(seeds, gate, up, *tensors, *saved_hs)
        ctx.activation, ctx.wide, ctx.call = activation, wide, call
        ctx.reads_product = saved_product is not None
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = _needs(ctx)
        seeds, gate, up, *saved = ctx.saved_tensors
        tensors, hs = saved[: len(needs) - 1], saved[len(needs) - 1 :]
        if dy is None:
            return (None,) * (_ARGUMENTS + 2 + len(tensors))
        if torch.is_grad_enabled() or are_batched([dy]):
            gradients = _differentiable(dy, gate, up, tensors, seeds, ctx)
        else:
            gradients = _gradients(dy, gate, up, tensors, hs, needs, seeds, ctx)
        return (None,) * _ARGUMENTS + tuple(gradients)


def _needs(ctx) -> list[bool]:
    """Whether gradients of the product, and of the output's tensors, are needed."""
    gate, up, *tensors = ctx.needs_input_grad[_ARGUMENTS:]
    return [gate or up, *tensors]


def _gradients(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    tensors: Sequence[Tensor],
    hs: Sequence[Tensor],
    needs: Sequence[bool],
    seeds: Tensor | None,
    ctx,
) -> list[Tensor | None]:
    """Of gate, up and the tensors; in the memory of the product and of its gradient."""
    backend, shape = ctx.call.backend, gate.shape
    gate, up = as_matrix(gate), as_matrix(up)
    if ctx.reads_product:
        product = backend.gated(gate, up, ctx.activation, ctx.wide)
    else:
        product = stand_in(gate, gate.shape, gate.dtype)
    gradients = run_backward([as_matrix(dy)], [product, *tensors], hs, needs, seeds, ctx.call)
    d_gate, *rest = gradients
    if d_gate is None:
        return [None, None, *rest]
    backend.gated_backward(d_gate, gate, up, ctx.activation, d_gate, product, ctx.wide)
    if len(shape) != 2:
        d_gate, product = d_gate.view(shape), product.view(shape)
    return [d_gate, product, *rest]


def _differentiable(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    tensors: Sequence[Tensor],
    seeds: Tensor | None,
    ctx,
) -> list[Tensor | None]:
    """The same by torch's own operations."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), autocast_off(dy.device.type):
        # Views, since one tensor may be there twice, and each time has a gradient of its own.
        inputs = [tensor.view_as(tensor) for tensor in (gate, up, *tensors)]
        gate, up = [matrix.float() if ctx.wide else matrix for matrix in inputs[:2]]
        product = (ACTIVATIONS[ctx.activation].function(gate) * up).to(inputs[0].dtype)
        ys = followed([product, *inputs[2:]], seeds, ctx.call)
    needs = ctx.needs_input_grad[_ARGUMENTS:]
    return gradients_of(ys, inputs, needs, [dy], create_graph)
