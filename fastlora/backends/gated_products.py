"""The middle of a gated MLP with torch's own operations: an activation times another matrix.

With gate, up and dy [M, N]:

    y      = act(gate) ∘ up
    d_gate = act'(gate) ∘ (dy ∘ up)         d_up = dy ∘ act(gate)

Each step is rounded to the matrices' dtype, as torch's own module does.  With ``wide``, for layers
that run in float32 on 16-bit tensors, only the last step is rounded.  The functions go over blocks
of rows that stay in the cache, so act(gate) is never allocated as a whole.

CONTRIBUTING.md lists the places that another activation needs.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..common.row_blocks import rows_at_a_time, slices
from .protocol import GatedProduct

_ATEN = torch.ops.aten


class _Activation(NamedTuple):
    function: Callable[[Tensor], Tensor]  # torch's own function, which autograd can follow
    apply: Callable[[Tensor, Tensor], object]  # (gate, out): writes act(gate) to out
    # (d_act, gate): multiplies d_act by act'(gate), in place
    differentiate: Callable[[Tensor, Tensor], object]


def _gelu(approximate: str) -> _Activation:
    return _Activation(
        partial(functional.gelu, approximate=approximate),
        lambda gate, out: _ATEN.gelu.out(gate, approximate=approximate, out=out),
        lambda d_act, gate: _ATEN.gelu_backward.grad_input(
            d_act, gate, approximate=approximate, grad_input=d_act
        ),
    )


def _relu_gradient(d_act: Tensor, gate: Tensor) -> Tensor:
    # d_act where gate > 0, else 0
    return _ATEN.threshold_backward.grad_input(d_act, gate, 0, grad_input=d_act)


ACTIVATIONS = {
    "silu": _Activation(
        functional.silu,
        lambda gate, out: _ATEN.silu.out(gate, out=out),
        lambda d_act, gate: _ATEN.silu_backward.grad_input(d_act, gate, grad_input=d_act),
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": _Activation(
        torch.relu, lambda gate, out: _ATEN.relu.out(gate, out=out), _relu_gradient
    ),
    "relu2": _Activation(
        lambda gate: torch.relu(gate).square(),
        lambda gate, out: _ATEN.relu.out(gate, out=out).square_(),
        # relu²' = 2 gate where gate > 0, else 0
        lambda d_act, gate: _relu_gradient(d_act.mul_(gate).mul_(2.0), gate),
    ),
}


def gated(product: GatedProduct) -> Tensor:
    """act(gate) ∘ up, [M, N], contiguous."""
    gate, up, activation, wide = product
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    step, apply = rows_at_a_time(gate), ACTIVATIONS[activation].apply
    # Without ``wide``, act(gate) is computed in y, and multiplied by up there.
    act = _buffer(gate, step, wide) if wide else y
    for rows in slices(len(gate), step):
        out = act[: rows.stop - rows.start] if wide else y[rows]
        apply(gate[rows].to(out.dtype), out)
        out.mul_(up[rows])
        if wide:
            y[rows].copy_(out)
    return y


def gated_backward(dy: Tensor, product: GatedProduct, d_gate: Tensor, d_up: Tensor) -> None:
    """Fill d_gate and d_up.  d_gate may be dy itself."""
    gate, up, activation, wide = product
    step, (_, apply, differentiate) = rows_at_a_time(gate), ACTIVATIONS[activation]
    act = _buffer(gate, step, wide)
    for rows in slices(len(gate), step):
        act_rows = act[: rows.stop - rows.start]
        gate_rows, dy_rows = gate[rows].to(act.dtype), dy[rows].to(act.dtype)
        apply(gate_rows, act_rows)
        # d_up = dy ∘ act(gate) comes first: d_gate may be dy, which the next product overwrites.
        torch.mul(dy_rows, act_rows, out=act_rows if wide else d_up[rows])
        d_act = torch.mul(dy_rows, up[rows], out=dy_rows if wide else d_gate[rows])
        differentiate(d_act, gate_rows)
        if wide:
            d_up[rows].copy_(act_rows)
            d_gate[rows].copy_(d_act)


def _buffer(gate: Tensor, rows: int, wide: bool) -> Tensor:
    """An uninitialized buffer for act(gate) over one block of rows."""
    dtype = torch.float32 if wide else gate.dtype
    return torch.empty_like(gate[:rows], dtype=dtype, memory_format=torch.contiguous_format)
