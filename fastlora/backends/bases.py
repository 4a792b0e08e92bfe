"""The product with a base's weight, forward and backward, whether that is plain or packed.

On a CPU a packed weight is made by blocks of rows in a buffer that stays, in the dtype of the
product, and dropped with the next block.  Elsewhere it is made as a whole, for this one product.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..formats.format import Quantised
from ..projection import HALF_DTYPES, Base
from .products import FEW, SCRATCH, cast, columns_of, for_few_rows, weight_rows

# Elements of dx that are summed in float32 at once, where dy and the weight have 16 bits (8 MiB).
_SUMMED = 2**21


def base_linear(x: Tensor, base: Base[Tensor], into: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias [M, N], new or written ``into`` this."""
    weight, bias = base.weight, cast(base.bias, x.dtype)
    if isinstance(weight, Quantised):
        if x.device.type == "cpu":
            y = x.new_empty(x.shape[0], weight.shape[0]) if into is None else into
            few = x.shape[0] in FEW and x.dtype == torch.float32
            x, out = for_few_rows(x) if few else x, y
            if few:
                out = SCRATCH.take("part", *y.shape, x.dtype, by_columns=True)
            for rows, some in weight_rows(weight, x.dtype):
                own_bias = None if bias is None else bias[rows]
                _write_linear(columns_of(out, rows), x, some, own_bias)
                del some  # before the next block is made
            return y.copy_(out) if few else y
        weight = weight.dense(x.dtype)
    return linear(x, weight, bias) if into is None else _write_linear(into, x, weight, bias)


def _write_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.T, out=y)
    return torch.addmm(bias, x, weight.T, out=y)


def add_dy_weight(dx: Tensor, dy: Tensor, weight: Tensor, beta: float) -> None:
    """dx = beta · dx + dy weight, in dx's dtype."""
    if isinstance(weight, Quantised) and dx.device.type != "cpu":
        weight = weight.dense(dx.dtype)
    if isinstance(weight, Tensor) and weight.dtype == dx.dtype:
        torch.addmm(dx, dy, weight, beta=beta, out=dx)
    elif dx.dtype in HALF_DTYPES:
        _add_rounding_once(dx, dy, weight, beta)
    else:
        for rows, some in weight_rows(weight, dx.dtype):
            part = columns_of(dy, rows)
            if part.dtype != dx.dtype:
                part = SCRATCH.widen("part", part)
            torch.addmm(dx, part, some, beta=beta, out=dx)
            del some
            beta = 1.0


def _add_rounding_once(dx: Tensor, dy: Tensor, weight: Tensor, beta: float) -> None:
    """The same in 16 bits: the products of blocks are summed in float32."""
    columns = dx.shape[1]
    step = max(1, _SUMMED // columns)
    for first in range(0, dx.shape[0], step):
        some, dy_rows = dx[first : first + step], dy[first : first + step]
        total = SCRATCH.take("total", len(some), columns)
        total.copy_(some) if beta else total.zero_()
        product = SCRATCH.take("product", len(some), columns, some.dtype)
        for rows, made in weight_rows(weight, dx.dtype):
            total.add_(torch.mm(columns_of(dy_rows, rows), made, out=product))
            del made
        some.copy_(total)
