"""Packing of dense weights as NF4, MXFP4, NVFP4, float8 or int8: a matrix, or experts' stack."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.other_packages import optional
from ..common.row_blocks import buffer_for, widened
from .arithmetic import packed_by_rows
from .bitsandbytes import FourBit
from .float8 import Float8
from .format import Quantized
from .microscaled import MXFP4, NVFP4, powers_of
from .rotated_int8 import pack_rotated

# e4m3's largest number and its smallest normal number, and e2m1's largest number.
_LARGEST, _SMALLEST, _LARGEST_E2M1 = 448.0, 2.0**-6, 6.0
_NF4_BLOCK, _FLOAT8_BLOCK = 64, 128
# Smaller magnitudes count as 0, because the reciprocal of such a scale would be infinite.
_NOTHING = 2.0**-100
# The upper bound of each e2m1 magnitude (0, 0.5, 1, 1.5, 2, 3, 4).  A value halfway between two
# codes goes to the even code: where the upper one is even, the bound is the float32 number below.
_BOUNDS = (0.25, 0.75 - 2**-24, 1.25, 1.75 - 2**-23, 2.5, 3.5 - 2**-22, 5.0)


def pack_weight(weight: Tensor, kind: str) -> Quantized:
    """weight [N, K] or [E, N, K], of any floating dtype, packed as one of :data:`KINDS`.

    * "nf4": bitsandbytes' quantizer, blocks of 64 with float32 scales;
    * "mxfp4": as torchao's ``to_mx`` with ``ScaleCalculationMode.EVEN``, which has the least error:
      a block's largest magnitude is rounded to e2m1's two significant bits, and the scale is the
      power of two in that number, divided by 4;
    * "nvfp4": as torchao's ``to_nvfp4`` with ``per_tensor_amax_to_scale``;
    * "fp8": e4m3fn with a float32 scale for each 128 × 128, as transformers' ``Fp8Quantize``; the
      last blocks may have fewer rows and columns;
    * "int8": :class:`.rotated_int8.RotatedInt8`.

    Each number is rounded to the nearest code, ties to even.  One matrix is packed at a time.
    Raises ValueError for another kind or shape, for infinities and NaN, and where blocks don't fill
    a row.  Raises ImportError where bitsandbytes is needed but not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    if not weight.is_floating_point() or weight.dim() not in (2, 3) or not weight.numel():
        raise ValueError(
            f"the weight is {weight.dtype} of shape {tuple(weight.shape)}, but must be floating, "
            "[N, K] or [E, N, K], and not empty"
        )
    stack: list[Tensor] = []
    with torch.no_grad():
        for i, matrix in enumerate(_matrices(weight)):
            if not bool(torch.linalg.vector_norm(matrix, torch.inf).float().isfinite()):
                raise ValueError("the weight has infinities or NaN, which can't be packed")
            packed = KINDS[kind](matrix)
            if weight.dim() == 2:
                return packed
            stack = stack or [one.new_empty(len(weight), *one.shape) for one in packed.tensors]
            for all_of_them, one in zip(stack, packed.tensors, strict=True):
                all_of_them[i] = one
    return Quantized(packed.format, tuple(stack))


def packing_error(weight: Tensor, packed: Quantized) -> float:
    """‖packed - weight‖ / ‖weight‖, a block of rows at a time; 0 for a weight of zeros."""
    if weight.shape != packed.shape:
        raise ValueError(f"the weight is {tuple(weight.shape)}, the packed {tuple(packed.shape)}")
    error = size = 0.0
    with torch.no_grad():
        for i, matrix in enumerate(_matrices(weight)):
            source = packed if weight.dim() == 2 else packed.one(i)
            for rows, made in widened(source, buffer_for(matrix, torch.float32)):
                exact = matrix[rows].double()
                error += float((made - exact).square_().sum())
                size += float(exact.square_().sum())
    return (error / size) ** 0.5 if size else 0.0


def _matrices(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 3 else weight[None]


def _e2m1(values: Tensor) -> Tensor:
    """Codes of values [n, blocks, block], two in a byte -> uint8 [n, columns / 2]."""
    bounds = torch.tensor(_BOUNDS, dtype=torch.float32, device=values.device)
    codes = torch.bucketize(values.abs(), bounds, out_int32=True).byte()
    codes = codes.bitwise_or_(values.signbit().byte() << 3).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _mxfp4(weight: Tensor) -> Quantized:
    format = MXFP4(*weight.shape)
    shape = format.blocks, format.block

    def pack(rows: Tensor) -> tuple[Tensor, Tensor]:
        blocks = rows.unflatten(1, shape)
        largest = blocks.abs().amax(-1)
        # Adding 2²¹ (half of the mantissa bit that e2m1 keeps) to float32's bits rounds, and may
        # carry into the exponent.  A scale above 2¹²⁵ would make the largest codes infinite.
        scale = ((largest.view(torch.int32) + 2**21) >> 23).sub_(2).clamp_(0, 252).byte()
        return _e2m1(blocks * powers_of(254 - scale)[..., None]), scale

    return Quantized(format, packed_by_rows(weight, pack))


def _nvfp4(weight: Tensor) -> Quantized:
    format = NVFP4(*weight.shape)
    shape = format.blocks, format.block
    largest = torch.linalg.vector_norm(weight, torch.inf).float()
    tensor_scale = (largest / (_LARGEST * _LARGEST_E2M1)).clamp_(min=_NOTHING)

    def pack(rows: Tensor) -> tuple[Tensor, Tensor]:
        blocks = rows.unflatten(1, shape)
        scale = blocks.abs().amax(-1) / _LARGEST_E2M1 / tensor_scale
        scale = scale.clamp_(_SMALLEST, _LARGEST).to(torch.float8_e4m3fn)
        return _e2m1(blocks * (1.0 / tensor_scale / scale.float())[..., None]), scale

    return Quantized(format, (*packed_by_rows(weight, pack), tensor_scale))


def _fp8(weight: Tensor) -> Quantized:
    (N, K), side = weight.shape, _FLOAT8_BLOCK

    def pack(rows: Tensor) -> tuple[Tensor, Tensor]:
        blocks = pad(rows, (0, -K % side, 0, -len(rows) % side))
        blocks = blocks.unflatten(1, (-1, side)).unflatten(0, (-1, side))
        largest = blocks.abs().amax((1, 3))
        factor = torch.where(largest > _NOTHING, _LARGEST / largest, 1.0)
        codes = (blocks * factor[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
        codes = codes.to(torch.float8_e4m3fn).flatten(0, 1).flatten(1)
        return codes[: len(rows), :K].contiguous(), 1.0 / factor

    format = Float8(N, K, "float8_e4m3fn", side, side)
    return Quantized(format, packed_by_rows(weight, pack, side))


def _nf4(weight: Tensor) -> Quantized:
    need = '"nf4" needs bitsandbytes\' quantizer'
    quantize = optional("bitsandbytes.functional", need, "quantized").quantize_4bit
    (N, K), block = weight.shape, _NF4_BLOCK
    weight = weight.float() if weight.element_size() > 4 else weight.contiguous()
    packed, state = quantize(weight, blocksize=block, quant_type="nf4")
    return Quantized(FourBit(N, K, "nf4", block), (packed.view(-1), state.absmax))


KINDS: dict[str, Callable[[Tensor], Quantized]] = {
    "nf4": _nf4, "mxfp4": _mxfp4, "nvfp4": _nvfp4, "fp8": _fp8, "int8": pack_rotated,
}  # fmt: skip
