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
by step, each product the op of :mod:`.grouped`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..backends import Settings, find_backend
from ..backends.gated import ACTIVATIONS
from ..blocks import rows_at_a_time
from ..projection import Adapter, Output, flatten, is_plain, layouts_of, unflatten
from .autocast import autocast_inputs, autocast_is_on, autocast_off
from .call import are_batched, gradients_of, run_grouped, run_grouped_backward
from .functional import draw_seed
from .grouped import lora_grouped
from .routing import Part, Routing, Sums, even_routing, routing_of
from .textbook import needs_textbook

# silu(gate) ∘ up of [gate, up], say, by the name of its activation; or any function of pre.
Activate = str | Callable[[Tensor], Tensor]
_ARGUMENTS = 7  # before x


def lora_experts(
    x: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
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
    any floating dtype.  Without both, x is sorted by expert, every expert has as many rows, and
    nothing is summed.  ``up`` and ``down`` are outputs with one adapter each or none, whose tensors
    are stacked as those of :func:`fastlora.lora_grouped`: up [E, F, K], down [E, N, I].
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
    elif on:
        x = x.to(up.base.weight.dtype)
    with autocast_off(device.type):
        experts = len(up.base.weight)
        if index is None or weights is None:
            routing, weights = even_routing(len(x), experts, device), x.new_ones(len(x), 1)
        else:
            routing = routing_of(index, experts)
        up, down = _with_adapter(up), _with_adapter(down)
        if not (one_node and _follows(x)):
            return _step_by_step(x, weights, routing, up, down, activate, dropout, dtype)
        layouts = (*layouts_of([up]), *layouts_of([down]))
        settings = Settings(layouts, dropout, find_backend(None, device))
        seeds = draw_seed(2, device) if dropout else None
        inputs = [x, weights, *flatten([up, down], layouts)]
        if torch.is_grad_enabled():
            order, ends, k = routing
            return LoRAExpertsFunction.apply(
                settings, activate, dtype, seeds, order, ends, k, *inputs
            )
        return _forward(inputs, routing, seeds, settings, activate, dtype)[0]


def _follows(x: Tensor) -> bool:
    """Whether a call with this x now can be one node."""
    return not torch.compiler.is_compiling() and is_plain(x) and not needs_textbook(x)


def _with_adapter(output: Output[Tensor]) -> Output[Tensor]:
    """The same; where there is no adapter, with one that changes nothing."""
    if output.adapters:
        return output
    weight = output.base.weight
    experts, rows, columns = weight.shape
    nothing = Adapter(weight.new_zeros(experts, 1, columns), weight.new_zeros(experts, rows, 1))
    return output._replace(adapters=(nothing,))


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
    pre = _multiplied(x[routing.tokens], up, routing, dropout)
    product = _differentiably_activated(pre, activate)
    y = _multiplied(product, down, routing, dropout)
    return routing.plain_sums(y, weights, dtype)


def _multiplied(rows: Tensor, output: Output[Tensor], routing: Routing, dropout: float) -> Tensor:
    (weight, bias), ((lora_a, lora_b, scale),) = output
    stacked = weight, lora_a, lora_b, routing.ends
    return lora_grouped(rows, *stacked, bias=bias, scale=scale, dropout=dropout)


class LoRAExpertsFunction(torch.autograd.Function):
    """One node for all experts."""

    @staticmethod
    def forward(
        ctx,
        settings: Settings,
        activate: Activate,
        dtype: torch.dtype,
        seeds: Tensor | None,
        order: Tensor,
        ends: Tensor,
        k: int,
        *inputs: Tensor,
    ) -> Tensor:
        """``inputs``: x, the routing weights, and the tensors of both outputs, laid flat."""
        routing = Routing(order, ends, k)
        out, made = _forward(inputs, routing, seeds, settings, activate, dtype)
        ctx.save_for_backward(seeds, order, ends, *inputs, *made)
        ctx.settings, ctx.activate, ctx.k = settings, activate, k
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[_ARGUMENTS:]
        if d_out is None:
            return (None,) * (_ARGUMENTS + len(needs))
        seeds, order, ends, *saved = ctx.saved_tensors
        inputs, made = saved[: len(needs)], saved[len(needs) :]
        call = Routing(order, ends, ctx.k), seeds, ctx.settings, ctx.activate
        if torch.is_grad_enabled() or are_batched([d_out]):
            gradients = _differentiable(d_out, inputs, needs, *call)
        else:
            with autocast_off(d_out.device.type):
                gradients = _gradients(d_out, inputs, made, needs, *call)
        return (*[None] * _ARGUMENTS, *gradients)


def _parts(inputs: Sequence[Tensor], routing: Routing, settings: Settings) -> list[Part]:
    """All experts at once, or some at a time, whose rows stay in cache."""
    x, _, up_weight, *_ = inputs
    if not settings.backend.takes_experts_in_turn(x.device):
        return routing.whole()
    return routing.parts(min(rows_at_a_time(x), rows_at_a_time(up_weight.mT)))


def _forward(
    inputs: Sequence[Tensor],
    routing: Routing,
    seeds: Tensor | None,
    settings: Settings,
    activate: Activate,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """out, and what the backward needs of each part: pre, and the h of both products."""
    x, weights, *_ = inputs
    (up, first), (down, second) = _halves(inputs, settings)
    parts, made = _parts(inputs, routing, settings), []
    of_first, of_second = _of_each(seeds)
    out, tokens = Sums(routing, parts, dtype), routing.tokens
    for part in parts:
        rows = [x[tokens[part.rows]], *part.cut(first)]
        pre, h = run_grouped(rows, part.segments, of_first, up)
        rows = [_activated(pre, activate, settings), *part.cut(second)]
        y, h_down = run_grouped(rows, part.segments, of_second, down)
        out.add(y, part, weights)
        made += [pre, h, h_down]
    return out.sums, made


def _of_each(seeds: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """That of the first product's mask, and of the second's."""
    return (None, None) if seeds is None else (seeds[:1], seeds[1:])


def _gradients(
    d_out: Tensor,
    inputs: Sequence[Tensor],
    made: Sequence[Tensor],
    needs: Sequence[bool],
    routing: Routing,
    seeds: Tensor | None,
    settings: Settings,
    activate: Activate,
) -> list[Tensor | None]:
    """Of x, the routing weights and both outputs' tensors, where they need one."""
    x, weights, *_ = inputs
    needs_x, needs_weights, *_ = needs
    parts, d_out = _parts(inputs, routing, settings), d_out.to(x.dtype)
    dx, d_weights, found = Sums(routing, parts, x.dtype), weights.new_zeros(routing.order.shape), []
    for part, *kept in zip(parts, made[::3], made[1::3], made[2::3], strict=True):
        d_rows, d_shares, *of_part = _gradients_of_part(
            d_out, inputs, kept, needs, part, routing, seeds, settings, activate
        )
        if d_rows is not None:
            dx.add(d_rows, part)
        if d_shares is not None:
            d_weights[routing.order[part.rows]] = d_shares.to(d_weights.dtype)
        found.append(of_part)
    return [
        dx.sums if needs_x else None,
        d_weights.view(weights.shape) if needs_weights else None,
        *map(_joined, zip(*found, strict=True)),
    ]


def _joined(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """One of all experts, of those of each part's."""
    some = [gradient for gradient in gradients if gradient is not None]
    return torch.cat(some) if len(some) > 1 else gradients[0]


def _gradients_of_part(
    d_out: Tensor,
    inputs: Sequence[Tensor],
    made: Sequence[Tensor],
    needs: Sequence[bool],
    part: Part,
    routing: Routing,
    seeds: Tensor | None,
    settings: Settings,
    activate: Activate,
) -> list[Tensor | None]:
    """Of the part's rows of x, of their weights, and of its experts' tensors.

    What belongs to y is multiplied by the weights where it is thinner: in the product and in h.
    """
    x, weights, *_ = inputs
    needs_x, needs_weights, *others = needs
    pre, h, h_down = made
    of_first, of_second = _of_each(seeds)
    (up, first), (down, second) = _halves(inputs, settings)
    first, second, segments = part.cut(first), part.cut(second), part.segments
    needs_up, needs_down = others[: len(first)], others[len(first) :]
    needs_pre = needs_x or any(needs_up)
    tokens, shares = routing.tokens[part.rows], routing.shares(weights, part)
    dy, product = d_out[tokens], _activated(pre, activate, settings)
    call = segments, (h_down * shares).to(h_down.dtype)
    shared = [(product * shares).to(product.dtype), *second]
    has_bias = down.layouts[0].has_bias
    but_bias = [need and not (has_bias and i == 1) for i, need in enumerate(needs_down)]
    d_product, *of_down = run_grouped_backward(
        dy, shared, *call, [needs_pre or needs_weights, *but_bias], of_second, down
    )
    d_shares = None
    if needs_weights:
        assert d_product is not None
        d_shares = torch.linalg.vecdot(d_product, product)
        if has_bias:
            padded = torch.cat([second[1], second[1].new_zeros(1, dy.shape[1])])  # nobody's
            d_shares += torch.linalg.vecdot(dy, padded[segments.of_rows(len(dy))].to(dy.dtype))
    if but_bias != needs_down:
        only = [False, False, True, False, False]
        of_down[1] = run_grouped_backward(dy.mul_(shares), shared, *call, only, of_second, down)[2]
    del dy, product, shared
    if not needs_pre:
        return [None, d_shares, *[None] * len(first), *of_down]
    assert d_product is not None
    d_pre = _through_activation(d_product.mul_(shares), pre, activate, settings)
    del d_product
    d_rows, *of_up = run_grouped_backward(
        d_pre, [x[tokens], *first], segments, h, [needs_x, *needs_up], of_first, up
    )
    return [d_rows, d_shares, *of_up, *of_down]


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


def _differentiably_activated(pre: Tensor, activate: Activate) -> Tensor:
    """The same, where autograd follows."""
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
    settings: Settings,
    activate: Activate,
) -> list[Tensor | None]:
    """The gradients by torch's own operations: autograd's, of the textbook formula."""
    create_graph = torch.is_grad_enabled()
    of_first, of_second = _of_each(seeds)
    with torch.enable_grad():
        # Views, since one tensor may be there twice, and each time has a gradient of its own.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        x, weights, *tensors = inputs
        up, down = unflatten([tensor.to(x.dtype) for tensor in tensors], settings.layouts)
        pre = _textbook(x[routing.tokens], up, routing, of_first, settings)
        product = _differentiably_activated(pre, activate)
        y = _textbook(product, down, routing, of_second, settings)
        out = routing.plain_sums(y, weights, d_out.dtype)
    return gradients_of([out], inputs, needs, [d_out], create_graph)


def _textbook(
    x: Tensor,
    output: Output[Tensor],
    routing: Routing,
    seed: Tensor | None,
    settings: Settings,
) -> Tensor:
    (weight, bias), ((lora_a, lora_b, scale),) = output
    mask, p = None, settings.dropout
    if seed is not None:
        mask = settings.backend.dropout_mask(seed, (x.shape[0], x.shape[1]), p)
    return reference.lora_grouped(
        x, weight, lora_a, lora_b, routing.ends.tolist(),
        bias=bias, scale=scale, dropout=p, mask=mask,
    )  # fmt: skip
