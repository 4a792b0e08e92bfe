"""MXFP4 and NVFP4: all their values, as transformers and torchao dequantize them."""

import pytest
import torch
from packed import NEEDS_5, random_mxfp4, random_nvfp4
from transformers.integrations import finegrained_fp8 as fp8
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fastlora.formats.format import Quantized
from fastlora.formats.microscaled import MXFP4, NVFP4

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
POWERS = {"uint8": torch.uint8, "e8m0": torch.float8_e8m0fnu}


def assert_same_bits(one: torch.Tensor, two: torch.Tensor) -> None:
    """The signs of zeros must agree; NaN equals NaN."""
    assert one.dtype == two.dtype
    same = (one == two) & (one.signbit() == two.signbit())
    assert (same | (one.isnan() & two.isnan())).all()


def every_mxfp4(scale: torch.dtype) -> Quantized:
    """One row for each scale, with every pair of codes in a byte."""
    packed = torch.arange(256).to(torch.uint8).repeat(256, 1)
    powers = torch.arange(256).to(torch.uint8)[:, None].repeat(1, 16)
    return Quantized(MXFP4(256, 512), (packed, powers.view(scale)))


def every_nvfp4(tensor_scale: float) -> Quantized:
    packed = torch.arange(256).to(torch.uint8).repeat(256, 1)
    scales = torch.arange(256).to(torch.uint8)[:, None].repeat(1, 32)
    tensors = (packed, scales.view(torch.float8_e4m3fn), torch.tensor(tensor_scale))
    return Quantized(NVFP4(256, 512), tensors)


@DTYPES
def test_mxfp4_of_bytes_is_transformers(dtype):
    weight = every_mxfp4(torch.uint8)
    blocks, scales = weight.tensors
    theirs = convert_moe_packed_tensors(blocks.view(1, 256, 16, 16), scales[None], dtype=dtype)
    made = weight.dense(dtype)
    assert_same_bits(made[:255], theirs[0].T[:255])
    assert made[255].isnan().all()


@DTYPES
@pytest.mark.parametrize("scale", POWERS.values(), ids=POWERS)
def test_fp4_of_deepseek_is_transformers(dtype, scale):
    weight = every_mxfp4(scale)
    packed, scales = weight.tensors
    weight = weight._replace(tensors=(packed.view(torch.int8), scales))
    if not hasattr(fp8, "Fp8Dequantize"):
        pytest.skip(NEEDS_5)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(packed.view(torch.int8), scales, dtype)
    made = weight.dense(dtype)
    if dtype == torch.float64:  # transformers computes float64 from float32
        made, theirs = made[:253], theirs[:253]
    if scale == torch.uint8:
        made, theirs = made[:255], theirs[:255]
    assert_same_bits(made, theirs)


@DTYPES
@pytest.mark.parametrize("tensor_scale", [1.0, 0.0173, 1e-38, 1e36])
def test_nvfp4_is_torchaos(dtype, tensor_scale):
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = every_nvfp4(tensor_scale)
    packed, scales, factor = weight.tensors
    theirs = nvfp4.NVFP4Tensor(packed, scales, 16, dtype, factor).dequantize()
    assert_same_bits(weight.dense(dtype), theirs)


@pytest.mark.parametrize(
    ("weight", "wrong"), [(random_mxfp4(4, 64), 48), (random_nvfp4(4, 32), 40)], ids=["mx", "nv"]
)
def test_rows_that_no_blocks_fill_are_refused(weight, wrong):
    format = type(weight.format)(4, wrong)
    with pytest.raises(ValueError, match=f"a row of the weight has {wrong} numbers, but a block"):
        format.check(weight.tensors)
