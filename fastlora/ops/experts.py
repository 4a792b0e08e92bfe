"""The experts of a mixture as one autograd node: gather, product, activation, product, sum.

Forward and backward take 1.07 to 1.14 × the frozen module's time, PEFT's 3.2 to 3.5 ×.  PEFT saves
13 to 21 × as many bytes for the backward (``make bench ARGS="-k experts"``, docs/experts.md).

T tokens are each sent to k of E experts: S = T · k rows, sorted by expert.  For a row with expert e
and token ``token``:

    pre        = up[e](x[token])           [S, F]
    product    = activate(pre)             [S, I]
    y          = down[e](product)          [S, N]
    out[token] = Σ weight · y              [T, N], the sum over the token's k rows

``order`` [S] sorts the rows by expert (:mod:`.routing`).  Row i has

    expert           index.view(-1)[order[i]]
    routing weight   weights.view(-1)[order[i]]
    token            order[i] // k

Saved for backward: the inputs, the dropout seeds, order, ends, pre, and h of both products.  The
backward recomputes x[token] and product, and never needs y.  With dy = d out[token]:

    dp        = dy through down[e]                 [S, I]; routing weights not yet included
    d weight  = dy · y = dp · product + dy · bias  [S], because y = product through down[e] + bias
    d product = weight · dp                        [S, I]

On a CPU, one product of all experts is no faster than one for each expert.  So the node runs a few
experts at a time (:class:`Part`), and only pre and h have all S rows.  On other devices, all
experts run at once.

Two kinds of calls take two grouped LoRA calls instead of the node: compiled calls, and calls whose
activation must not run twice.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import BackwardCall, Call, GatedProduct, find_backend
from ..backends.gated_products import ACTIVATIONS
from ..call.projection import Output, flatten, layouts_of
from ..call.rows import Rows
from ..common.row_blocks import block_of_rows, rows_at_a_time
from .dispatch import autocast_inputs, autocast_is_on, autocast_off, is_eager
from .node import as_matrix, draw_seed, refuse_by_torch_only
from .routing import Part, Routing, routing_of
from .run import run_new

# A function of pre, or the name of an activation.  "silu" means silu(gate) ∘ up, where gate and up
# are the halves of pre's columns.
Activate = str | Callable[[Tensor], Tensor]
_EACH = "call fastlora.lora_linear for each expert"


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
    """The experts' outputs for x, weighted and summed for each token: [T, N], in x's dtype.

    Shapes: x [T, K]; index [T, k], the experts of each token, of an integer dtype; weights [T, k],
    the routing weights, of any floating dtype.  ``up`` and ``down`` have at most one adapter each.
    Their tensors are stacked as in :func:`fastlora.grouped_lora_linear`: up.base.weight [E, F, K],
    down.base.weight [E, N, I].  A number from E on in ``index`` means no expert, and adds zero.

    ``activate`` maps [S, F] to [S, I].  It is a differentiable function, or the name of an
    activation (silu, gelu, gelu_tanh, relu, relu2).  With a name, F is 2 I, and the result is
    act(first half of the columns) ∘ (second half).  ``one_node``: run as one node, whose backward
    calls the function again.  ``dropout`` acts on the inputs of both adapters.  Each adapter has
    its own mask, with all S rows.

    Under autocast, x and the weights of ``up`` and ``down`` are cast to autocast's dtype, as in
    ``nn.Linear``.  Without ``autocasts``, only x is cast, to the dtype of up's weight, because
    ``grouped_mm`` requires equal dtypes.

    This function checks nothing.  The caller must check all shapes, and that x and the weights of
    ``up`` and ``down`` have one dtype outside of autocast.
    """
    device, dtype = x.device, x.dtype
    is_autocast = autocast_is_on(device.type)
    if is_autocast and autocasts:
        x, (up, down) = autocast_inputs(x, [up, down])
    elif is_autocast and isinstance(up.base.weight, Tensor):
        x = x.to(up.base.weight.dtype)
    with autocast_off(device.type):
        routing = routing_of(index, up.base.weight.shape[0])
        if not (one_node and is_eager(x)):  # two grouped LoRA calls, each dispatched separately
            rows = Rows(routing.ends)
            (pre,), _ = run_new(x[routing.tokens], [up], dropout, rows=rows)
            if isinstance(activate, str):
                gate, other = pre.chunk(2, dim=1)
                product = ACTIVATIONS[activate].function(gate) * other
            else:
                product = activate(pre)
            (y,), _ = run_new(product, [down], dropout, rows=rows)
            return routing.plain_sums(y, weights, dtype)
        layouts, backend = layouts_of([up, down]), find_backend(None, device)
        seeds = draw_seed(2, device) if dropout else None
        most = None  # rows of a part
        if backend.takes_experts_in_turn(device):  # few rows, so that they stay in cache
            most = min(rows_at_a_time(x), block_of_rows(device, up.base.weight.shape[1]))
        # Flat lists, because autograd tracks only tensors that are direct arguments of ``apply``.
        # Each part of the experts slices the tensors of these lists.
        of_up, of_down = flatten([up], layouts[:1]), flatten([down], layouts[1:])
        call, parts = Call(layouts, dropout, backend), routing.parts(most)
        node = _Node(call, activate, dtype, routing, parts, seeds, len(of_up))
        inputs = [x, weights, *of_up, *of_down]
        if torch.is_grad_enabled():
            return LoRAExpertsFunction.apply(node, *inputs)
        return node.forward(inputs)[0]


class LoRAExpertsFunction(torch.autograd.Function):
    """One autograd node for all experts; the module's docstring says which tensors it saves."""

    @staticmethod
    def forward(ctx, node: "_Node", *inputs: Tensor) -> Tensor:
        """``inputs``: x, the routing weights, and the flat tensors of up and down."""
        out, results = node.forward(inputs)
        # The backward reads order and ends from the node.  They are saved also, so that tools that
        # count saved tensors count them.
        order, ends, _ = node.routing
        ctx.save_for_backward(*inputs, *results, order, ends)
        ctx.node = node
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        _, *needs = ctx.needs_input_grad
        if d_out is None:
            return (None, *[None] * len(needs))
        saved = ctx.saved_tensors
        # Saved: the inputs, the results, order and ends.
        inputs, results = saved[: len(needs)], saved[len(needs) : -2]
        refuse_by_torch_only([d_out], "a call of all experts", _EACH)
        with autocast_off(d_out.device.type):
            return None, *ctx.node.gradients(inputs, d_out, needs, results)


class _Product(NamedTuple):
    """One of the two products of a part."""

    tensors: Sequence[Tensor]  # the flat tensors of up or down: views of the part's experts
    seed: Tensor | None
    call: Call

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """y, and h if the product has an adapter."""
        (y,), hs = self.call.backend.forward([x, *self.tensors], self.seed, self.call)
        return y, hs

    def backward(
        self, dy: Tensor, x: Tensor, hs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of x and of the tensors."""
        inputs = [x, *self.tensors]
        given = BackwardCall([dy], inputs, hs, needs, self.seed, self.call)
        return self.call.backend.backward(given)


class _Node(NamedTuple):
    """A call of the node without the tensors that autograd saves: ``inputs`` and results.

    ``inputs`` are x, the routing weights, and the flat tensors of up and down.
    """

    call: Call  # layouts of up and down
    activate: Activate
    dtype: torch.dtype  # of out
    routing: Routing
    parts: list[Part]
    seeds: Tensor | None  # of up's and down's dropout
    split: int  # the number of up's flat tensors, which come before down's

    def activated(self, pre: Tensor) -> Tensor:
        """The input of the second product, [rows, I], without a graph for autograd."""
        if isinstance(self.activate, str):
            gate, up = pre.chunk(2, dim=1)
            return self.call.backend.gated(GatedProduct(gate, up, self.activate))
        with torch.no_grad():
            return self.activate(pre)

    def through_activation(self, d_product: Tensor, pre: Tensor) -> Tensor:
        """The gradient of pre, [rows, F].  It may overwrite ``d_product``.

        A function ``activate`` runs once more, with autograd on.
        """
        if isinstance(self.activate, str):
            d_pre = torch.empty_like(pre)
            (gate, up), (d_gate, d_up) = pre.chunk(2, dim=1), d_pre.chunk(2, dim=1)
            gated = GatedProduct(gate, up, self.activate)
            self.call.backend.gated_backward(d_product, gated, d_gate, d_up)
            return d_pre
        with torch.enable_grad():
            pre = pre.detach().requires_grad_()
            product = self.activate(pre)
        (d_pre,) = torch.autograd.grad(product, pre, d_product)
        return as_matrix(d_pre)

    def products(self, inputs: Sequence[Tensor], part: Part) -> tuple[_Product, _Product]:
        """The products of up and down for a part."""
        # Views: every tensor of up and down has the experts as its first axis.
        tensors, products = [tensor[part.experts] for tensor in inputs[2:]], []
        for i, layout in enumerate(self.call.layouts):
            flat = tensors[self.split :] if i else tensors[: self.split]
            seed = None if self.seeds is None or not layout.scales else self.seeds[i : i + 1]
            part_call = self.call._replace(layouts=(layout,), rows=part.segments)
            products.append(_Product(flat, seed, part_call))
        up, down = products
        return up, down

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """out, and the results saved for backward: pre, up's h and down's h, part after part.

        A product without an adapter has no h.
        """
        x, weights, *_ = inputs
        tokens, results, out = self.routing.tokens, list[Tensor](), None
        for part in self.parts:
            # Freed after each part: x[tokens] [rows, K], product [rows, I] and y [rows, N].
            up, down = self.products(inputs, part)
            pre, hs = up.forward(x[tokens[part.rows]])
            y, down_hs = down.forward(as_matrix(self.activated(pre)))
            out = self.routing.added(out, y, part, self.dtype, weights)
            results += [pre, *hs, *down_hs]
        assert out is not None
        return out.to(self.dtype), results

    def gradients(
        self,
        inputs: Sequence[Tensor],
        d_out: Tensor,
        needs: Sequence[bool],
        results: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The gradients of ``inputs``; None for each input that needs none."""
        (x, weights, *_), routing = inputs, self.routing
        needs_weights = needs[1]
        d_out, per_part = d_out.to(x.dtype), len(results) // len(self.parts)  # pre and hs
        dx, d_weights = None, weights.new_zeros(routing.order.shape)
        # dx sums over the parts.  The experts' own gradients are joined: a part has some experts.
        d_parts = []
        for i, part in enumerate(self.parts):
            own_results = results[i * per_part : (i + 1) * per_part]
            gradients = self._gradients_of_part(inputs, d_out, needs, part, own_results)
            d_rows, d_row_weights, *d_tensors = gradients
            if d_rows is not None:
                dx = routing.added(dx, d_rows, part, x.dtype)
            if d_row_weights is not None:  # each row writes to its own entry of [T, k]
                d_weights[routing.order[part.rows]] = d_row_weights.to(d_weights.dtype)
            d_parts.append(d_tensors)
        return [
            None if dx is None else dx.to(x.dtype),
            d_weights.view(weights.shape) if needs_weights else None,
            *(map(_joined, zip(*d_parts, strict=True)) if len(d_parts) > 1 else d_parts[0]),
        ]

    def _gradients_of_part(
        self,
        inputs: Sequence[Tensor],
        d_out: Tensor,
        needs: Sequence[bool],
        part: Part,
        results: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The gradients of a part: its rows of x, their routing weights, and its experts' tensors.

        The gradients of down's weight and adapter are sums over weight · dy · product or weight ·
        dy · h.  Here the product [rows, I] and h [rows, r] are multiplied by the routing weights,
        because they have fewer columns than dy [rows, N].
        """
        (x, weights, *_), (pre, *hs) = inputs, results
        needs_x, needs_weights, *needs_flat = needs
        needs_up, needs_down = needs_flat[: self.split], needs_flat[self.split :]
        needs_pre = needs_x or any(needs_up)
        up, down = self.products(inputs, part)
        (up_layout,), (layout,) = up.call.layouts, down.call.layouts
        tokens = self.routing.tokens[part.rows]
        row_weights = self.routing.row_weights(weights, part)  # [rows, 1]
        dy, product = d_out[tokens], self.activated(pre)  # both recomputed: [rows, N], [rows, I]
        weighted = (product * row_weights).to(product.dtype)
        count = len(up_layout.scales)  # the first ``count`` of hs are up's
        down_hs = [(h * row_weights).to(h.dtype) for h in hs[count:]]
        # This backward computes all gradients of down except d bias.  With the routing weights w:
        #
        #     d weight = dyᵀ (w · product)       d lora_b = dyᵀ (w · h)       d bias = Σ w · dy
        #
        # In d bias, w must be a factor of dy, so a second backward below computes it.  d_product is
        # dp of the module's docstring, without w.
        bias_at, d_row_weights = layout.bias_at, None  # an index in down's tensors, or None
        without_bias = [need and i != bias_at for i, need in enumerate(needs_down)]
        wanted = [needs_pre or needs_weights, *without_bias]
        d_product, *of_down = down.backward(dy, weighted, down_hs, wanted)
        if needs_weights:
            assert d_product is not None
            # The gradient of each row's w: dy · y = dp · product + dy · bias.
            d_row_weights = torch.linalg.vecdot(d_product, product)
            if bias_at is not None:
                bias, rows = down.tensors[bias_at], part.segments.of_rows(len(dy))
                padded = torch.cat([bias, bias.new_zeros(1, dy.shape[1])])  # for rows of no expert
                d_row_weights += torch.linalg.vecdot(dy, padded[rows].to(dy.dtype))
        if bias_at is not None and needs_down[bias_at]:
            only = [False, *[i == bias_at for i in range(len(needs_down))]]
            _, *of_bias = down.backward(dy.mul_(row_weights), weighted, down_hs, only)
            of_down[bias_at] = of_bias[bias_at]
        del dy, product, weighted
        if not needs_pre:
            return [None, d_row_weights, *[None] * len(needs_up), *of_down]
        assert d_product is not None
        # d product = weight · dp; all gradients from here on include the routing weights.
        d_pre = self.through_activation(d_product.mul_(row_weights), pre)
        del d_product
        d_rows, *of_up = up.backward(d_pre, x[tokens], hs[:count], [needs_x, *needs_up])
        return [d_rows, d_row_weights, *of_up, *of_down]


def _joined(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient of one stacked tensor, joined from the gradients of the parts."""
    parts = [gradient for gradient in gradients if gradient is not None]
    return torch.cat(parts) if parts else None
