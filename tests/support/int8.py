"""The formulas of 8-bit products in NumPy, with sums in int64; and numbers that rotate exactly."""

import numpy
import torch
from torch import Tensor

from fastlora.formats.format import Quantized
from fastlora.formats.rotated_int8 import RotatedInt8


def hadamard() -> numpy.ndarray:
    """Sylvester's matrix / 8: entry (i, j) is negative if i & j has an odd number of bits."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(64)] for i in range(64)]
    return numpy.array(signs) / 8


def rotated(x: numpy.ndarray) -> numpy.ndarray:
    """Each whole block of 64 columns times :func:`hadamard`, in float64."""
    whole = x.shape[1] // 64 * 64
    blocks = x[:, :whole].astype(numpy.float64).reshape(len(x), -1, 64) @ hadamard()
    return numpy.concatenate([blocks.reshape(len(x), whole), x[:, whole:]], 1)


def rounded(x: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Codes [M, K] and scales [M] of float32 rows."""
    largest = numpy.maximum(numpy.abs(x).max(1), numpy.float32(2.0**-100)).astype(numpy.float32)
    codes = numpy.rint(x * (numpy.float32(127) / largest)[:, None])
    return codes.astype(numpy.int64), largest / numpy.float32(127)


def product(codes, scale, matrix, wide) -> numpy.ndarray:
    """(codes matrix) · scale of each row: the sums in int64, then in the dtype ``wide``."""
    sums = codes.astype(numpy.int64) @ matrix.astype(numpy.int64)
    return sums.astype(wide) * scale.astype(wide)[:, None]


def of_tensor(x: Tensor) -> numpy.ndarray:
    return x.detach().float().numpy()


def linear(x: Tensor, weight: Quantized, bias: Tensor | None = None, wide=numpy.float32) -> Tensor:
    """y in the dtype ``wide``.  x must rotate exactly (:func:`exact`)."""
    codes, scale = (tensor.numpy() for tensor in weight.tensors)
    xq = rounded(rotated(of_tensor(x)).astype(numpy.float32))
    y = product(*xq, codes.T, wide) * scale.astype(wide)
    return torch.from_numpy(y if bias is None else y + of_tensor(bias))


def before_rotation(dy: Tensor, weight: Quantized, wide=numpy.float32) -> Tensor:
    """The part of dx whose rotation is dx, in the dtype ``wide``."""
    codes, scale = (tensor.numpy() for tensor in weight.tensors)
    return torch.from_numpy(product(*rounded(of_tensor(dy) * scale), codes, wide))


def exact(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers -2 to 2, times a power of 2 for each row: their rotation rounds nothing."""
    powers = torch.randint(-8, 8, (*shape[:-1], 1)).float().exp2()
    return (torch.randint(-2, 3, shape) * powers).to(dtype)


def random_weight(n: int, k: int) -> Quantized:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return Quantized(RotatedInt8(n, k, "bfloat16"), (codes, torch.rand(n) / 1000))
