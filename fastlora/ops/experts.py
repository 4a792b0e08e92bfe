"""The experts of a mixture as one node: gather, first product, activation, second product, sum.

With T tokens, each sent to k of E experts, and S = T · k rows sorted by expert:

    pre = up[e](x[token])                  y = down[e](activate(pre))
    out[token] = Σ weight · y              over the token's k rows

Besides its arguments the node keeps pre [S, F], every h, the routing, and y where the router
trains.  The gathered x and what the activation makes are made again in the backward.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .. import reference
from ..backends import Settings, find_backend
from ..backends.gated import ACTIVATIONS
from ..projection import Output, flatten, layouts_of, unflatten
from ..segments import Segments
from .autocast import autocast_off
from .call import are_batched, gradients_of, run_grouped, run_grouped_backward

# silu(gate) ∘ up of [gate, up], say, by the name of its activation; or any function of pre.
Activate = str | Callable[[Tensor], Tensor]
_ARGUMENTS = 5  # before x


class Routing(NamedTuple):
    """Which rows are whose.  ``order`` int64 [S]: row i is of token order[i] // k."""

    order: Tensor
    ends: Tensor  # of Segments
    k: int

    @property
    def tokens(self) -> Tensor:
        return self.order.div(self.k, rounding_mode="floor")

    @property
    def places(self) -> Tensor:
        """The rows of each token, [T, k]."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        return places.view(-1, self.k)

    def sums(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum of each token's rows, times its weights [T, k] if any: [S, N] -> [T, N].

        In the wider dtype of both.  torch's bag of embeddings is this, without a copy of the rows.
        """
        if weights is None or weights.dtype == rows.dtype:
            return embedding_bag(self.places, rows, mode="sum", per_sample_weights=weights)
        return (rows[self.places] * weights.unsqueeze(-1)).sum(1)


def routing_of(index: Tensor, experts: int) -> Routing:
    """Of the experts [T, k] of every token; a number from ``experts`` on is nobody's.

    Nothing is read on the host.
    """
    sorted_index, order = index.reshape(-1).sort(stable=True)
    numbers = torch.arange(experts, device=index.device, dtype=sorted_index.dtype)
    ends = torch.searchsorted(sorted_index, numbers, right=True, out_int32=True)
    return Routing(order, ends, index.shape[1])


def lora_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Output[Tensor],
    down: Output[Tensor],
    activate: Activate,
) -> Tensor:
    """out [T, N]: what the experts make of x [T, K], summed with these weights.

    index [T, k], an integer dtype, has each token's experts, and weights [T, k] their weights, of
    any floating dtype.  ``up`` and ``down`` are outputs with one adapter each, whose tensors are
    stacked as those of :func:`fastlora.lora_grouped`: up [E, F, K], down [E, N, I].  ``activate``
    makes [S, I] of [S, F]: a function that autograd follows, or the name of an activation (silu,
    gelu, gelu_tanh, relu, relu2), which is that of the first half, times the second.

    The caller has checked that they fit, and that x and the weights have one dtype.
    """
    settings = Settings((*layouts_of([up]), *layouts_of([down])), 0.0, find_backend(None, x.device))
    routing = routing_of(index, len(up.base.weight))
    inputs = [x, weights, *flatten([up, down], settings.layouts)]
    if torch.is_grad_enabled():
        order, ends, k = routing
        return LoRAExpertsFunction.apply(settings, activate, order, ends, k, *inputs)
    return _forward(inputs, routing, settings, activate)[0]


class LoRAExpertsFunction(torch.autograd.Function):
    """One node for all experts.  y is kept only where the routing weights need a gradient."""

    @staticmethod
    def forward(
        ctx,
        settings: Settings,
        activate: Activate,
        order: Tensor,
        ends: Tensor,
        k: int,
        *inputs: Tensor,
    ) -> Tensor:
        """``inputs``: x, the routing weights, and the tensors of both outputs, laid flat."""
        out, *made, y = _forward(inputs, Routing(order, ends, k), settings, activate)
        kept_y = y if ctx.needs_input_grad[_ARGUMENTS + 1] else None
        ctx.save_for_backward(order, ends, *inputs, *made, kept_y)
        ctx.settings, ctx.activate, ctx.k = settings, activate, k
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[_ARGUMENTS:]
        if d_out is None:
            return (None,) * (_ARGUMENTS + len(needs))
        order, ends, *saved = ctx.saved_tensors
        inputs, made = saved[: len(needs)], saved[len(needs) :]
        call = Routing(order, ends, ctx.k), ctx.settings, ctx.activate
        if torch.is_grad_enabled() or are_batched([d_out]):
            gradients = _differentiable(d_out, inputs, needs, *call)
        else:
            with autocast_off(d_out.device.type):
                gradients = _gradients(d_out, inputs, made, needs, *call)
        return (*[None] * _ARGUMENTS, *gradients)


def _forward(
    inputs: Sequence[Tensor], routing: Routing, settings: Settings, activate: Activate
) -> tuple[Tensor, ...]:
    """out, pre, the h of both products, and y."""
    x, weights, *_ = inputs
    first, second = _halves(inputs, settings)
    segments = Segments(routing.ends)
    pre, h = run_grouped([x[routing.tokens], *first[1]], segments, None, first[0])
    product = _activated(pre, activate, settings)
    y, h_down = run_grouped([product, *second[1]], segments, None, second[0])
    return routing.sums(y, weights).to(x.dtype), pre, h, h_down, y


def _gradients(
    d_out: Tensor,
    inputs: Sequence[Tensor],
    made: Sequence[Tensor],
    needs: Sequence[bool],
    routing: Routing,
    settings: Settings,
    activate: Activate,
) -> list[Tensor | None]:
    """Of x, the routing weights and both outputs' tensors, where they need one."""
    x, weights, *_ = inputs
    needs_x, needs_weights, *others = needs
    pre, h, h_down, y = made
    first, second = _halves(inputs, settings)
    count, segments = len(first[1]), Segments(routing.ends)
    dy = d_out[routing.tokens]
    d_weights = None
    if needs_weights:
        d_weights = torch.linalg.vecdot(dy, y)[routing.places].to(weights.dtype)
    dy.mul_(weights.reshape(-1)[routing.order].unsqueeze(1))
    product = _activated(pre, activate, settings)
    needs_pre = needs_x or any(others[:count])
    d_product, *of_down = run_grouped_backward(
        dy, [product, *second[1]], segments, h_down, [needs_pre, *others[count:]], None, second[0]
    )
    if d_product is None:
        return [None, d_weights, *[None] * count, *of_down]
    d_pre = _through_activation(d_product, pre, activate, settings)
    gathered = x[routing.tokens]
    dx, *of_up = run_grouped_backward(
        d_pre, [gathered, *first[1]], segments, h, [needs_x, *others[:count]], None, first[0]
    )
    return [None if dx is None else routing.sums(dx), d_weights, *of_up, *of_down]


def _halves(
    inputs: Sequence[Tensor], settings: Settings
) -> list[tuple[Settings, Sequence[Tensor]]]:
    """Of each product its settings and its tensors."""
    up, down = settings.layouts
    count = len(flatten(unflatten(inputs[2:], settings.layouts)[:1], (up,)))
    tensors = inputs[2:]
    return [
        (settings._replace(layouts=(up,)), tensors[:count]),
        (settings._replace(layouts=(down,)), tensors[count:]),
    ]


def _activated(pre: Tensor, activate: Activate, settings: Settings) -> Tensor:
    if isinstance(activate, str):
        gate, up = pre.chunk(2, dim=1)
        return settings.backend.gated(gate, up, activate)
    with torch.no_grad():
        return activate(pre)


def _through_activation(
    d_product: Tensor, pre: Tensor, activate: Activate, settings: Settings
) -> Tensor:
    """The gradient of pre."""
    if isinstance(activate, str):
        d_pre = torch.empty_like(pre)
        (gate, up), (d_gate, d_up) = pre.chunk(2, dim=1), d_pre.chunk(2, dim=1)
        settings.backend.gated_backward(d_product, gate, up, activate, d_gate, d_up)
        return d_pre
    with torch.enable_grad():
        pre = pre.detach().requires_grad_()
        product = activate(pre)
    (d_pre,) = torch.autograd.grad(product, pre, d_product)
    return d_pre


def _differentiable(
    d_out: Tensor,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    routing: Routing,
    settings: Settings,
    activate: Activate,
) -> list[Tensor | None]:
    """The gradients by torch's own operations: autograd's, of the textbook formula."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one tensor may be there twice, and each time has a gradient of its own.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        x, weights, *tensors = inputs
        up, down = unflatten([tensor.to(x.dtype) for tensor in tensors], settings.layouts)
        pre = _textbook(x[routing.tokens], up, routing)
        if isinstance(activate, str):
            gate, other = pre.chunk(2, dim=1)
            product = ACTIVATIONS[activate].function(gate) * other
        else:
            product = activate(pre)
        y = _textbook(product, down, routing)[routing.places]
        out = (y * weights.unsqueeze(-1)).sum(1).to(x.dtype)
    return gradients_of([out], inputs, needs, [d_out], create_graph)


def _textbook(x: Tensor, output: Output[Tensor], routing: Routing) -> Tensor:
    (weight, bias), ((lora_a, lora_b, scale),) = output
    ends = routing.ends.tolist()
    return reference.lora_grouped(x, weight, lora_a, lora_b, ends, bias=bias, scale=scale)
