"""Gated MLPs."""

import torch
from judge import make_projection
from torch import Tensor

from fastlora.projection import Output, as_outputs

K, HIDDEN, N = 24, 40, 20


def make_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def make_mlp(
    dtype=torch.float32, adapter_dtype=None, bias=False, adapted="gud", sizes=(K, HIDDEN, N)
) -> list[Output]:
    """gate, up and down, with numbers of usual sizes; those whose letters are named have adapters.

    All that an adapter is made of trains, and biases do.
    """
    k, hidden, n = sizes
    outputs = []
    for letter, rows, columns, r in (("g", hidden, k, 3), ("u", hidden, k, 8), ("d", n, hidden, 5)):
        projection = make_projection(rows, columns, r, dtype, adapter_dtype, bias)
        with torch.no_grad():
            for tensor in projection[:3]:
                tensor.mul_(tensor.shape[1] ** -0.5)
        (output,) = as_outputs([projection])
        outputs.append(output if letter in adapted else output._replace(adapters=()))
    return outputs
