"""A gated MLP, down(act(gate(x)) ∘ up(x)), whose product is recomputed in the backward.

The MLP of Qwen3 0.6B (512 tokens, float32, r 16, dropout) saves 14.1 MiB for the backward, in place
of 26.1 MiB layer by layer and 38.1 MiB with PEFT, in the same time as layer by layer
(``make bench ARGS="-k mlp"``, docs/blocks.md).

It consists of two autograd nodes:

    gate, up = x through both layers        LoRALinearFunction, of :mod:`.node`
    product  = act(gate) ∘ up               GatedLinearFunction, from here on
    y        = down(product)

Saved for backward: x, gate, up, every h, and the seeds.  act(gate) and the product aren't saved.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from ..backends import BackwardCall, Call, GatedProduct, find_backend
from ..backends.gated_products import ACTIVATIONS
from ..call.checks import check_call
from ..call.projection import Output, flatten, layouts_of
from ..common.remembered import remember
from . import kinds
from .dispatch import autocast_inputs, autocast_is_on, autocast_off
from .kinds import key_of_outputs
from .node import (
    Function,
    LoRALinearFunction,
    as_matrix,
    draw_seed,
    refuse_by_torch_only,
    to_save,
)


class GatedCall(NamedTuple):
    """The settings of a gated MLP's call, without its tensors: an entry of the cache."""

    first: Call  # gate and up
    last: Call  # down
    # The seeds that separate calls of gate and up, and of down, draw.  On a GPU one draw of two
    # numbers differs from two draws of one number.
    draws: tuple[list[int], list[int]]
    split: int  # the number of gate's and up's tensors, which come before down's
    activation: str
    wide: bool


def gated_call(
    x: Tensor,
    gate: Output[Tensor],
    up: Output[Tensor],
    down: Output[Tensor],
    activation: str,
    dropout: float = 0.0,
    down_dropout: float = 0.0,
    wide: bool = False,
) -> tuple[Tensor, GatedCall | None]:
    """y = down(act(gate(x)) ∘ up(x)), [..., N].

    :func:`fastlora.ops.dispatch.follows` must be true for x.

    Shapes: x [..., K]; the weights of gate and up [I, K]; the weight of down [N, I].
    :func:`fastlora.lora_linear` describes the dtypes.  Each weight may be packed; its dense copy
    lives only during a product.  ``activation`` is silu, gelu, gelu_tanh, relu or relu2.

    ``dropout`` acts on the adapters of gate and up, ``down_dropout`` on the adapters of down.  The
    masks equal the masks of three separate calls, in the order gate, up, down.  ``wide``: for a
    16-bit x, compute the activation, the product and their gradients in float32, as modules do
    whose layers return float32.  Each result is then rounded to 16 bits for the next product.

    Gradients of gradients raise RuntimeError.

    Also returns a record, which serves all calls of this kind by :func:`run_gated`.  It is None if
    autocast is on or the call has no key.

    Raises the errors of :func:`fastlora.lora_linear`, and ValueError for an unknown activation, or
    if the weights of gate and up have different shapes.
    """
    rates = dropout, type(dropout), down_dropout, type(down_dropout)
    key, inputs = key_of_outputs(x, (gate, up, down), (GatedCall, *rates, activation, wide))
    known = kinds.calls.get(key)
    if known is not None:
        return run_gated(inputs, known), known
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation is {activation!r}, but must be one of {names}")
    device = x.device.type
    autocast = autocast_is_on(device)
    check_call(x, (gate, up), dropout, True, autocast)
    if gate.base.weight.shape != up.base.weight.shape:
        shapes = [tuple(output.base.weight.shape) for output in (gate, up)]
        raise ValueError(f"gate and up have weights {shapes[0]} and {shapes[1]}: make them equal")
    # The checks of down need an input with I features.  This tensor has them, and costs nothing.
    weight = gate.base.weight
    hidden = weight.T if isinstance(weight, Tensor) else x.new_empty(0, weight.shape[0])
    check_call(hidden, (down,), down_dropout, True, autocast)
    if autocast:
        x, (gate, up, down) = autocast_inputs(x, (gate, up, down))
    backend = find_backend(device=x.device)
    captures = key is not None and not autocast
    calls, draws = [], []
    for outputs, p in (((gate, up), dropout), ((down,), down_dropout)):
        # One seed for each adapter; no entry for an output without an adapter or dropout.
        counts = [len(output.adapters) for output in outputs if output.adapters and p]
        captured: dict | None = {} if captures else None
        calls.append(Call(layouts_of(outputs), p if counts else 0.0, backend, captured=captured))
        draws.append(counts)
    first, last = calls
    tensors = flatten((gate, up), first.layouts)
    call = GatedCall(first, last, (draws[0], draws[1]), len(tensors), activation, wide)
    inputs = [x, *tensors, *flatten((down,), last.layouts)]
    with autocast_off(device):
        # A tensor may come from a transform of torch.func that has ended.
        y = run_gated(unwrap_dead_wrappers(tuple(inputs)), call)
    if captures:
        remember(kinds.calls, key, call)
    return y, call if captures else None


def run_gated(inputs: Sequence[Tensor], call: GatedCall) -> Tensor:
    """y of a call of a known kind; ``inputs``: x and the flat tensors of gate, up and down."""
    x, split = inputs[0], 1 + call.split
    of_first, of_last = call.draws
    seeds = torch.cat([draw_seed(count, x.device) for count in of_first]) if of_first else None
    down_seeds = draw_seed(of_last[0], x.device) if of_last else None
    # gate and up, [..., I] each.
    hidden = LoRALinearFunction.apply(seeds, None, call.first, *inputs[:split])
    return GatedLinearFunction.apply(down_seeds, call, *hidden, *inputs[split:])


class GatedLinearFunction(Function):
    """The node of y = down(act(gate) ∘ up).

    Saved for backward: gate, up, down's tensors, the seeds, and every h.  An h is omitted if its
    lora_b needs no gradient.  The product is recomputed.
    """

    @staticmethod
    def forward(
        ctx, seeds: Tensor | None, call: GatedCall, gate: Tensor, up: Tensor, *tensors: Tensor
    ) -> Tensor:
        last = call.last
        middle = GatedProduct(as_matrix(gate), as_matrix(up), call.activation, call.wide)
        product = last.backend.gated(middle)
        (y,), hs = last.backend.forward([product, *tensors], seeds, last)
        if gate.dim() != 2:
            # resize_, not view: autograd forbids in-place changes of a view from a Function.
            y.resize_(*gate.shape[:-1], y.shape[-1])
        _, _, needs_gate, needs_up, *needs = ctx.needs_input_grad
        # needs_input_grad follows forward's arguments: seeds, call, gate, up, tensors.
        needs = [needs_gate or needs_up, *needs]  # of the product and of down's tensors
        saved_product, saved_hs = to_save(product, hs, needs, last.layouts)
        ctx.save_for_backward(seeds, gate, up, *tensors, *saved_hs)
        ctx.call, ctx.reads_product = call, saved_product is not None
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, needs_gate, needs_up, *needs = ctx.needs_input_grad
        nothing, needs = (None, None), [needs_gate or needs_up, *needs]
        seeds, *saved = ctx.saved_tensors
        # inputs: gate, up and down's tensors.  ``needs`` has one entry less: the product's.
        inputs, hs = saved[: len(needs) + 1], saved[len(needs) + 1 :]
        if dy is None:
            return (*nothing, *[None] * len(inputs))
        refuse_by_torch_only([dy], "a fused MLP", "optimize the model with gated_mlps=False")
        (gate, up, *tensors), call, last = inputs, ctx.call, ctx.call.last
        shape = gate.shape
        middle = GatedProduct(as_matrix(gate), as_matrix(up), call.activation, call.wide)
        if ctx.reads_product:  # for the gradient of a lora_a or of the weight
            product = last.backend.gated(middle)
        else:
            product = gate.new_empty(middle.gate.shape)  # not read
        given = BackwardCall([as_matrix(dy)], [product, *tensors], hs, needs, seeds, last)
        with autocast_off(dy.device.type):
            d_gate, *rest = last.backend.backward(given)
            # So far, d_gate is the gradient of the product.  None: neither gate nor up needs one.
            if d_gate is None:
                return (*nothing, None, None, *rest)
            # d_gate overwrites the gradient of the product, and d_up the recomputed product.
            last.backend.gated_backward(d_gate, middle, d_gate, product)
        if len(shape) != 2:
            # product holds d_up now.
            d_gate, product = d_gate.view(shape), product.view(shape)
        return (*nothing, d_gate, product, *rest)
