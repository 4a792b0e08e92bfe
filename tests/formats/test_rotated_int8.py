"""Rotated int8: the rotation, the rounding of rows, and the weights' values."""

import int8
import numpy
import pytest
import torch
from int8 import exact, of_tensor

from fastlora.formats import rotated_int8
from fastlora.formats.format import from_text
from fastlora.formats.packing import pack_weight, packing_error
from fastlora.formats.rotated_int8 import hadamard, quantize_rows, rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_matrix_is_sylvesters_and_its_own_inverse():
    matrix = hadamard(torch.float64, torch.device("cpu"))
    assert numpy.array_equal(matrix.numpy(), int8.hadamard())
    assert torch.equal(matrix @ matrix, torch.eye(64, dtype=torch.float64))


@pytest.mark.parametrize("columns", [1, 63, 64, 100, 192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_blocks_of_64_are_rotated(columns, dtype):
    x = exact(7, columns, dtype=dtype)
    found = rotate(x)
    assert found.dtype == dtype
    assert numpy.array_equal(of_tensor(found), int8.rotated(of_tensor(x)))
    assert torch.equal(rotate(found), x)
    assert torch.equal(rotate(x.T.contiguous().T), found)


@pytest.mark.parametrize("values_of", ["x", "x times factors", "rotated x"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_rounded_to_the_nearest_code(monkeypatch, dtype, values_of):
    monkeypatch.setattr(rotated_int8, "_AT_ONCE", 500)  # three rows at a time
    torch.manual_seed(0)
    x = exact(10, 130, dtype=dtype)
    x[3], x[4, 5:] = 0.0, 0.0
    rotates, factor = values_of == "rotated x", torch.rand(130)
    values = int8.rotated(of_tensor(x)) if rotates else of_tensor(x)
    if values_of == "x times factors":
        values = values * factor.numpy()
        codes, scale = quantize_rows(x, factor)
    else:
        codes, scale = quantize_rows(x, rotated=rotates)
    expected = int8.rounded(values.astype(numpy.float32))
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert numpy.array_equal(codes.numpy(), expected[0])
    assert numpy.array_equal(scale.numpy(), expected[1])
    assert not codes[3].any()
    largest = codes.abs().amax(1)
    assert largest[largest != 0].eq(127).all()


def test_numbers_of_any_size():
    for size in (2.0**-130, 2.0**-101, 2.0**-99, 1.0, 2.0**100, 2.0**127):
        x = torch.tensor([[1.0, -0.5, 0.25]]) * size
        codes, scale = quantize_rows(x)
        assert (codes * scale[:, None] - x).abs().max() <= max(size, 2.0**-100) / 127


def test_no_rows():
    codes, scale = quantize_rows(torch.empty(0, 64), rotated=True)
    assert (codes.shape, scale.shape) == ((0, 64), (0,))


@pytest.mark.parametrize("columns", [64, 100, 256])
def test_a_weight_has_less_error_than_without_the_rotation(columns):
    torch.manual_seed(0)
    weight = torch.randn(40, columns)
    weight[:, 3] *= 30  # a feature that is much larger than the others
    packed = pack_weight(weight.bfloat16(), "int8")
    assert packed.dtype == torch.bfloat16
    plain, of_row = quantize_rows(weight.bfloat16())
    error = (plain * of_row[:, None] - weight.bfloat16()).norm() / weight.norm()
    assert packing_error(weight.bfloat16(), packed) < (0.7 if columns > 64 else 0.9) * error


def test_a_format_of_another_dtype_is_refused():
    packed = pack_weight(torch.randn(9, 100), "int8")
    format = from_text(packed.format.text.replace("float32", "int32"))
    with pytest.raises(ValueError, match="int32 came"):
        format.check(packed.tensors)
