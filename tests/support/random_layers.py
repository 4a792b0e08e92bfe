"""Layers that no model has, drawn from a seed: all layouts, ranks, dtypes, and what trains."""

from dataclasses import dataclass
from random import Random

import torch
from packed import random_float8, random_four_bit, random_int8
from torch import Tensor

from fastlora.projection import Adapter, Base, Output

_ROWS = (1, 2, 7, 16, 17, 33, 64, 65, 127, 300, 1000, 4097)
_FEATURES = (1, 8, 24, 40, 100, 257, 640, 1000, 1024, 2048, 4096)
_RANKS = (1, 3, 8, 8, 16, 16, 16, 20, 64, 96, 200)
# A matrix [rows, columns] is cut from an empty one: its shape, and the cut.
LAYOUTS = {
    "dense": lambda empty, rows, columns: empty(rows, columns),
    "transposed": lambda empty, rows, columns: empty(columns, rows).T,
    "columns": lambda empty, rows, columns: empty(rows, columns + 24)[:, 5:-19],
    "columns-at-16-bytes": lambda empty, rows, columns: empty(rows, columns + 32)[:, 16:-16],
    "every-second-row": lambda empty, rows, columns: empty(2 * rows, columns)[::2],
    "at-an-odd-address": lambda empty, rows, columns: empty(rows * columns + 3)[3:].view(rows, -1),
    "expanded": lambda empty, rows, columns: empty(1, columns).expand(rows, columns),
}


@dataclass
class RandomLayer:
    x: Tensor
    outputs: list[Output[Tensor]]
    dys: list[Tensor]
    dropout: float

    @property
    def leaves(self) -> list[Tensor]:
        """What trains."""
        tensors = [self.x]
        for base, adapters in self.outputs:
            tensors += [base.bias] * (base.bias is not None)
            tensors += [tensor for adapter in adapters for tensor in adapter[:2]]
        return [tensor for tensor in tensors if tensor.requires_grad]


def random_layer(seed: int) -> RandomLayer:
    """Of up to five outputs, one of them perhaps frozen, some with two adapters; nothing is filled.

    dtypes are float16, bfloat16 and float32, of x and of each adapter.
    """
    draw = Random(seed)
    dtype = draw.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))

    def matrix(rows: int, columns: int, of: torch.dtype = dtype, dense: float = 0.5) -> Tensor:
        layout = "dense" if draw.random() < dense else draw.choice(list(LAYOUTS))
        return LAYOUTS[layout](lambda *shape: torch.empty(shape, dtype=of), rows, columns)

    def adapter(N: int, K: int) -> Adapter[Tensor]:
        pair = [matrix(r, K, of, dense=0.8), matrix(N, r, of, dense=0.8)]
        return Adapter(*(each.requires_grad_(draw.random() < 0.9) for each in pair), 2.0)

    def output(K: int) -> Output[Tensor]:
        N, bias = draw.choice(_FEATURES), None
        if draw.random() < 0.3:
            bias = torch.empty(N, dtype=draw.choice((dtype, torch.float32)))
            bias.requires_grad_(draw.random() < 0.3)
        count = draw.choice((0, 1, 1, 1, 1, 1, 1, 2))
        return Output(Base(matrix(N, K), bias), tuple(adapter(N, K) for _ in range(count)))

    M, K, r = draw.choice(_ROWS), draw.choice(_FEATURES), draw.choice(_RANKS)
    of = draw.choice((dtype, torch.float32, torch.float16))  # the adapters
    x = matrix(M, K).requires_grad_(draw.random() < 0.8)
    outputs = [output(K) for _ in range(draw.choice((1, 1, 1, 2, 3, 5)))]
    dys = [matrix(M, len(each.base.weight)) for each in outputs]
    return RandomLayer(x, outputs, dys, draw.choice((0.0, 0.1)))


def packed_layers() -> list[RandomLayer]:
    """With packed weights: unpacked in a product and made dense; one, a group, blocks over rows."""
    layers = []
    for make, widths in (
        (lambda n, k: random_four_bit(n, k, nested=256), (256,)),
        (lambda n, k: random_four_bit(n, k, block=128), (256, 64)),
        (random_int8, (256, 64)),
        (lambda n, k: random_float8(n, k, 128, 128, scale=torch.float32), (256,)),
    ):
        for rows, columns in ((16, 512), (200, 512), (16, 200)):
            x = torch.empty(rows, columns, dtype=torch.bfloat16, requires_grad=True)
            outputs = [
                Output(
                    Base(make(width, columns)),
                    (
                        Adapter(
                            torch.empty(8, columns, requires_grad=True),
                            torch.empty(width, 8, requires_grad=True),
                            2.0,
                        ),
                    ),
                )
                for width in widths
            ]
            dys = [torch.empty(rows, width, dtype=x.dtype) for width in widths]
            layers.append(RandomLayer(x, outputs, dys, 0.1 * (len(widths) > 1)))
    return layers
