"""The middle of a gated MLP by torch's own operations: an activation times another matrix.

With gate, up and dy [M, N]:

    y      = act(gate) ∘ up
    d_gate = act'(gate) ∘ (dy ∘ up)         d_up = dy ∘ act(gate)

Each step is rounded to the matrices' dtype, as torch's own module rounds it.  It goes over blocks
of rows that stay in cache, so that no act(gate) of the whole size exists.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..blocks import rows_at_a_time

_ATEN = torch.ops.aten


class _Activation(NamedTuple):
    function: Callable[[Tensor], Tensor]  # torch's own, which autograd follows
    apply: Callable[[Tensor, Tensor], object]  # of a gate, into the second tensor
    differentiate: Callable[[Tensor, Tensor], object]  # times the gradient, in its place, of a gate


def _gelu(approximate: str) -> _Activation:
    return _Activation(
        partial(functional.gelu, approximate=approximate),
        lambda gate, out: _ATEN.gelu.out(gate, approximate=approximate, out=out),
        lambda d_act, gate: _ATEN.gelu_backward.grad_input(
            d_act, gate, approximate=approximate, grad_input=d_act
        ),
    )


def _relu_gradient(d_act: Tensor, gate: Tensor) -> Tensor:
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
        lambda d_act, gate: _relu_gradient(d_act.mul_(gate).mul_(2.0), gate),
    ),
}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) ∘ up, [M, N], contiguous."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    apply = ACTIVATIONS[activation].apply
    for rows in _blocks(gate):
        apply(gate[rows], y[rows])
        y[rows].mul_(up[rows])
    return y


def gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor
) -> None:
    """Fill d_gate and d_up; d_gate may be dy itself."""
    _, apply, differentiate = ACTIVATIONS[activation]
    act = torch.empty_like(gate[: rows_at_a_time(gate)], memory_format=torch.contiguous_format)
    for rows in _blocks(gate):
        some = act[: rows.stop - rows.start]
        apply(gate[rows], some)
        torch.mul(dy[rows], some, out=d_up[rows])
        torch.mul(dy[rows], up[rows], out=d_gate[rows])
        differentiate(d_gate[rows], gate[rows])


def _blocks(matrix: Tensor) -> Iterator[slice]:
    step = rows_at_a_time(matrix)
    for first in range(0, len(matrix), step):
        yield slice(first, min(first + step, len(matrix)))
