"""The experts of a mixture as one node: gather, first product, activation, second product, sum.

With T tokens, each sent to k of E experts, and S = T · k rows sorted by expert:

    pre = up[e](x[token])                  y = down[e](activate(pre))
    out[token] = Σ weight · y              over the token's k rows

Besides its arguments the node keeps pre [S, F], every h, and the routing.  The gathered x and what
the activation makes are made again in the backward.  y isn't needed there: with p = activate(pre),
and dp its gradient as if every weight were 1,

    d weight = d out[token] · y = dp · p + d out[token] · bias

Where a backend takes experts in turn, on a CPU, rows come in parts, those of some experts each, so
that besides pre and h nothing of S rows is ever made.

What a node can't be (compiled calls, an activation that mustn't run twice) is the same formula step
by step, each product a call of experts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Call, find_backend
from ..backends.gated import ACTIVATIONS
from ..blocks import block_of_rows, rows_at_a_time
from ..projection import Base, Output, flatten, layouts_of, unflatten
from .dispatch import autocast_inputs, autocast_is_on, autocast_off, is_eager
from .node import are_batched, followed, gradients_of, run_backward, run_forward
from .routing import Part, Routing, Sums, routing_of
from .run import draw_seed, run_checked

# silu(gate) ∘ up of [gate, up], say, by the name of its activation; or any function of pre.
Activate = str | Callable[[Tensor], Tensor]
_ARGUMENTS = 4  # before x


def lora_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Output[Tensor],
    down: Output[Tensor],
    activate: Activate,
    *,
    dropout: float = 0.0,
    one_node: bool = True,
    autocasts: bool = True,
) -> Tensor:
    """out [T, N]: what the experts make of x [T, K], summed with these weights.

    index [T, k], an integer dtype, has each token's experts, and weights [T, k] their weights, of
    any floating dtype.  ``up`` and ``down`` are outputs with one adapter each or none, whose
    tensors are stacked as in :func:`fastlora.grouped_lora_linear`: up [E, F, K], down [E, N, I].
    ``activate`` makes [S, I] of [S, F]: a function that autograd follows, or the name of an
    activation (silu, gelu, gelu_tanh, relu, relu2), which is that of the first half, times the
    second.  ``one_node``: the function may run again in the backward.  ``dropout`` acts on the
    inputs of both adapters, each with a mask of its own of all S rows.

    Under autocast x and the weights are cast to its dtype, as ``nn.Linear`` would, or, without
    ``autocasts``, x to that of the weights, as ``grouped_mm`` wants it.  out has x's dtype.

    The caller has checked that they fit, and that, outside of autocast, x and the weights have one
    dtype.
    """
    device, dtype = x.device, x.dtype
    on = autocast_is_on(device.type)
    if on and autocasts:
        x, (up, down) = autocast_inputs(x, [up, down])
    elif on and isinstance(up.base.weight, Tensor):
        x = x.to(up.base.weight.dtype)
    with autocast_off(device.type):
        routing = routing_of(index, up.base.weight.shape[0])
        if not (one_node and is_eager(x)):
            return _step_by_step(x, weights, routing, up, down, activate, dropout, dtype)
        layouts, backend = layouts_of([up, down]), find_backend(None, device)
        seeds = draw_seed(2, device) if dropout else None
        node = _Node(Call(layouts, dropout, backend), activate, dtype, routing.k)
        inputs = [x, weights, *flatten([up, down], layouts)]
        if torch.is_grad_enabled():
            return LoRAExpertsFunction.apply(node, seeds, routing.order, routing.ends, *inputs)
        return _forward(inputs, routing, seeds, node)[0]


def _step_by_step(
    x: Tensor,
    weights: Tensor,
    routing: Routing,
    up: Output[Tensor],
    down: Output[Tensor],
    activate: Activate,
    dropout: float,
    dtype: torch.dtype,
) -> Tensor:
    rows = routing.rows
    (pre,), _ = run_checked(x[routing.tokens], [up], dropout, rows=rows)
    (y,), _ = run_checked(_followed_activation(pre, activate), [down], dropout, rows=rows)
    return routing.plain_sums(y, weights, dtype)


class _Node(NamedTuple):
    """What a node is besides its tensors."""

    call: Call  # of both products, for rows that are cut later
    activate: Activate
    dtype: torch.dtype  # of what comes out
    k: int

    def products(
        self, inputs: Sequence[Tensor], part: Part, seeds: Tensor | None
    ) -> list[tuple[list[Tensor], Tensor | None, Call]]:
        """Of each product: its tensors of a part's experts, laid flat, its seed, and its call."""
        products, layouts = [], self.call.layouts
        for i, output in enumerate(unflatten(inputs[2:], layouts)):
            layout = layouts[i : i + 1]
            tensors = [tensor[part.experts] for tensor in flatten([output], layout)]
            seed = None if seeds is None or not output.adapters else seeds[i : i + 1]
            call = self.call._replace(layouts=layout, rows=part.segments)
            products.append((tensors, seed, call))
        return products

    def parts(self, inputs: Sequence[Tensor], routing: Routing) -> list[Part]:
        """All experts at once, or some at a time, whose rows stay in cache."""
        x, _, *tensors = inputs
        if not self.call.backend.takes_experts_in_turn(x.device):
            return routing.whole()
        hidden = unflatten(tensors, self.call.layouts)[0].base.weight.shape[1]
        return routing.parts(min(rows_at_a_time(x), block_of_rows(x.device, hidden)))

    def activated(self, pre: Tensor) -> Tensor:
        if isinstance(self.activate, str):
            gate, up = pre.chunk(2, dim=1)
            return self.call.backend.gated(gate, up, self.activate)
        with torch.no_grad():
            return self.activate(pre)

    def through_activation(self, d_product: Tensor, pre: Tensor) -> Tensor:
        """The gradient of pre."""
        if isinstance(self.activate, str):
            d_pre = torch.empty_like(pre)
            (gate, up), (d_gate, d_up) = pre.chunk(2, dim=1), d_pre.chunk(2, dim=1)
            self.call.backend.gated_backward(d_product, gate, up, self.activate, d_gate, d_up)
            return d_pre
        with torch.enable_grad():
            pre = pre.detach().requires_grad_()
            product = self.activate(pre)
        (d_pre,) = torch.autograd.grad(product, pre, d_product)
        return d_pre


class LoRAExpertsFunction(torch.autograd.Function):
    """One node for all experts."""

    @staticmethod
    def forward(
        ctx, node: _Node, seeds: Tensor | None, order: Tensor, ends: Tensor, *inputs: Tensor
    ) -> Tensor:
        """``inputs``: x, the routing weights, and the tensors of both outputs, laid flat."""
        out, made = _forward(inputs, Routing(order, ends, node.k), seeds, node)
        ctx.save_for_backward(seeds, order, ends, *inputs, *made)
        ctx.node = node
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        needs, node = ctx.needs_input_grad[_ARGUMENTS:], ctx.node
        if d_out is None:
            return (None,) * (_ARGUMENTS + len(needs))
        seeds, order, ends, *saved = ctx.saved_tensors
        inputs, made = saved[: len(needs)], saved[len(needs) :]
        routing = Routing(order, ends, node.k)
        if torch.is_grad_enabled() or are_batched([d_out]):
            gradients = _differentiable(d_out, inputs, needs, routing, seeds, node)
        else:
            with autocast_off(d_out.device.type):
                gradients = _gradients(d_out, inputs, made, needs, routing, seeds, node)
        return (*[None] * _ARGUMENTS, *gradients)


def _forward(
    inputs: Sequence[Tensor], routing: Routing, seeds: Tensor | None, node: _Node
) -> tuple[Tensor, list[Tensor]]:
    """out, and what the backward needs of each part: pre, and the h of both products, if any."""
    x, weights, *_ = inputs
    parts, made = node.parts(inputs, routing), []
    out, tokens = Sums(routing, parts, node.dtype), routing.tokens
    for part in parts:
        (up, up_seed, up_call), (down, down_seed, down_call) = node.products(inputs, part, seeds)
        (pre,), hs = run_forward([x[tokens[part.rows]], *up], up_seed, up_call)
        (y,), down_hs = run_forward([node.activated(pre), *down], down_seed, down_call)
        out.add(y, part, weights)
        made += [pre, *hs, *down_hs]
    return out.sums, made


def _gradients(
    d_out: Tensor,
    inputs: Sequence[Tensor],
    made: Sequence[Tensor],
    needs: Sequence[bool],
    routing: Routing,
    seeds: Tensor | None,
    node: _Node,
) -> list[Tensor | None]:
    """Of x, the routing weights and both outputs' tensors, where they need one."""
    x, weights, *_ = inputs
    needs_x, needs_weights, *_ = needs
    parts, d_out, left = node.parts(inputs, routing), d_out.to(x.dtype), iter(made)
    dx, d_weights = Sums(routing, parts, x.dtype), weights.new_zeros(routing.order.shape)
    of_parts = []
    for part in parts:
        made_of_part = [next(left) for _ in range(len(made) // len(parts))]
        d_rows, d_shares, *of_part = _gradients_of_part(
            d_out, inputs, made_of_part, needs, part, routing, seeds, node
        )
        if d_rows is not None:
            dx.add(d_rows, part)
        if d_shares is not None:
            d_weights[routing.order[part.rows]] = d_shares.to(d_weights.dtype)
        of_parts.append(of_part)
    return [
        dx.sums if needs_x else None,
        d_weights.view(weights.shape) if needs_weights else None,
        *map(_joined, zip(*of_parts, strict=True)),
    ]


def _joined(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """One of all experts, of those of each part's."""
    if len(gradients) == 1 or gradients[0] is None:
        return gradients[0]
    return torch.cat([gradient for gradient in gradients if gradient is not None])


def _gradients_of_part(
    d_out: Tensor,
    inputs: Sequence[Tensor],
    made: Sequence[Tensor],
    needs: Sequence[bool],
    part: Part,
    routing: Routing,
    seeds: Tensor | None,
    node: _Node,
) -> list[Tensor | None]:
    """Of the part's rows of x, of their weights, and of its experts' tensors.

    What belongs to y is multiplied by the weights where it is thinner: in the product and in h.
    """
    x, weights, *_ = inputs
    needs_x, needs_weights, *others = needs
    pre, *hs = made
    up, down = node.products(inputs, part, seeds)
    needs_up, needs_down = others[: len(up[0])], others[len(up[0]) :]
    needs_pre = needs_x or any(needs_up)
    tokens, shares = routing.tokens[part.rows], routing.shares(weights, part)
    dy, product = d_out[tokens], node.activated(pre)
    count = len(up[2].layouts[0].scales)
    down_hs = [(h * shares).to(h.dtype) for h in hs[count:]]
    d_product, d_shares, of_down = _through_down(
        dy, product, shares, down, down_hs, needs_down, needs_pre, needs_weights
    )
    del dy, product
    if not needs_pre:
        return [None, d_shares, *[None] * len(needs_up), *of_down]
    assert d_product is not None
    d_pre = node.through_activation(d_product.mul_(shares), pre)
    del d_product
    tensors, seed, call = up
    d_rows, *of_up = run_backward(
        [d_pre], [x[tokens], *tensors], hs[:count], [needs_x, *needs_up], seed, call
    )
    return [d_rows, d_shares, *of_up, *of_down]


def _through_down(
    dy: Tensor,
    product: Tensor,
    shares: Tensor,
    down: tuple[list[Tensor], Tensor | None, Call],
    hs: Sequence[Tensor],
    needs: Sequence[bool],
    needs_pre: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """The gradients of the second product's input, as if every weight were 1, of its rows' weights,
    and of its tensors."""
    tensors, seed, call = down
    shared = [(product * shares).to(product.dtype), *tensors]
    (wanted,), (output,) = unflatten(needs, call.layouts), unflatten(tensors, call.layouts)
    # dy isn't multiplied by the weights, and the bias has nothing else that could be.
    others = flatten([wanted._replace(base=wanted.base._replace(bias=False))], call.layouts)
    d_product, *gradients = run_backward(
        [dy], shared, hs, [needs_pre or needs_weights, *others], seed, call
    )
    d_shares, bias, rows = None, output.base.bias, call.rows
    assert rows is not None
    if needs_weights:
        assert d_product is not None
        d_shares = torch.linalg.vecdot(d_product, product)
        if bias is not None:
            padded = torch.cat([bias, bias.new_zeros(1, dy.shape[1])])  # nobody's
            d_shares += torch.linalg.vecdot(dy, padded[rows.of_rows(len(dy))].to(dy.dtype))
    if wanted.base.bias:
        nothing = unflatten([False] * len(needs), call.layouts)[0]
        only = flatten([nothing._replace(base=Base(False, True))], call.layouts)
        _, *also = run_backward([dy.mul_(shares)], shared, hs, [False, *only], seed, call)
        pairs = zip(gradients, also, strict=True)
        gradients = [one if other is None else other for one, other in pairs]
    return d_product, d_shares, gradients


def _followed_activation(pre: Tensor, activate: Activate) -> Tensor:
    """The activation, where autograd follows."""
    if not isinstance(activate, str):
        return activate(pre)
    gate, up = pre.chunk(2, dim=1)
    return ACTIVATIONS[activate].function(gate) * up


def _differentiable(
    d_out: Tensor,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    routing: Routing,
    seeds: Tensor | None,
    node: _Node,
) -> list[Tensor | None]:
    """The gradients by torch's own operations: autograd's, of the composite path."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), autocast_off(d_out.device.type):
        # Views, since one tensor may be there twice, and each time has a gradient of its own.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        x, weights, *_ = inputs
        (part,) = routing.whole()
        (up, up_seed, up_call), (down, down_seed, down_call) = node.products(inputs, part, seeds)
        (pre,) = followed([x[routing.tokens], *up], up_seed, up_call)
        product = _followed_activation(pre, node.activate)
        (y,) = followed([product, *down], down_seed, down_call)
        out = routing.plain_sums(y, weights, d_out.dtype)
    return gradients_of([out], inputs, needs, [d_out], create_graph)
