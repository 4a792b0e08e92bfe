"""Formats: the values of packed tensors in every dtype, and the formats' checks."""

import dataclasses

import pytest
import torch
from packed import MAKERS, by_elements, random_four_bit, random_int8

from fastlora.formats import arithmetic, float8
from fastlora.formats.bitsandbytes import FourBit
from fastlora.formats.float8 import Float8
from fastlora.formats.format import Quantized, from_text
from fastlora.formats.torchao import Affine
from fastlora.projection import Base, Output, flatten, layouts_of, unflatten


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def weight(request) -> Quantized:
    torch.manual_seed(0)
    return request.param()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_dense_weight_rounds_each_element_once(weight, dtype):
    made = weight.dense(dtype)
    assert torch.equal(made, by_elements(weight, dtype).to(dtype))
    assert made.is_contiguous()


@pytest.mark.parametrize("code", float8.CODES)
@pytest.mark.parametrize("columns", [256, 255])
def test_every_number_of_float8(code, columns):
    """Including NaN, infinity and the sign of zeros."""
    codes = torch.arange(256).to(torch.uint8).view(getattr(torch, code))[None, :columns]
    weight = Quantized(Float8(1, columns, code, 1, columns), (codes, torch.ones(1, 1)))
    made, truth = weight.dense(torch.float32), codes.float()
    torch.testing.assert_close(made, truth, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(made.signbit() | made.isnan(), truth.signbit() | truth.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_a_few_rows_at_a_time(weight, dtype, monkeypatch):
    monkeypatch.setattr(arithmetic, "_AT_ONCE", 3 * weight.shape[1])
    assert torch.equal(weight.dense(dtype), by_elements(weight, dtype).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(weight, dtype):
    out = torch.empty(0, weight.shape[1], dtype=dtype)
    assert weight.format.read(weight.tensors, 3, out) is out


def test_rows_are_read_into_a_part_of_a_larger_tensor(weight):
    n, k = weight.shape
    memory = torch.full((n, k + 3), 7.0)
    weight.format.read(weight.tensors, 3, memory[3 : n - 1, 1 : k + 1])
    expected = torch.full((n, k + 3), 7.0)
    expected[3 : n - 1, 1 : k + 1] = by_elements(weight)[3:-1]
    assert torch.equal(memory, expected)


def test_the_text_tells_the_format(weight):
    assert from_text(weight.format.text) == weight.format


@pytest.mark.parametrize("text", ["", "Elsewhere 1 2", "Affine 3 4"])
def test_another_text_tells_none(text):
    with pytest.raises(ValueError, match="tells of no format"):
        from_text(text)


@pytest.mark.parametrize("change", ["shape", "dtype", "stride", "missing"])
def test_the_checks_name_the_wrong_tensor(weight, change):
    for i, (name, tensor) in enumerate(zip(weight.format.names, weight.tensors, strict=True)):
        if change == "shape":
            wrong = torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])
        elif change == "dtype":
            wrong = tensor.to(torch.int16)
        else:
            wrong = torch.stack([tensor, tensor], -1)[..., 0]
        tensors = [*weight.tensors[:i], wrong, *weight.tensors[i + 1 :]]
        words = {"shape": f"its {name} has shape", "dtype": f"its {name} has dtype"}
        match = words.get(change, f"its {name} has strides")
        if change == "missing":
            tensors, match = tensors[:-1], "tensors came, but there must be"
        if change == "stride" and wrong.is_contiguous():
            continue
        with pytest.raises(ValueError, match=match):
            weight.format.check(tensors)


@pytest.mark.parametrize("change", [{"kind": "nf5"}, {"block": 0}, {"nested": -1}], ids=str)
def test_the_checks_name_wrong_settings(change):
    weight = random_four_bit(8, 16)
    with pytest.raises(ValueError, match="must be"):
        dataclasses.replace(weight.format, **change).check(weight.tensors)


def test_a_packed_weight_is_flat_as_all_its_tensors():
    four, eight = random_four_bit(6, 16, nested=2), random_int8(7, 16)
    bias = torch.ones(6)
    outputs = [Output(Base(four, bias)), Output(Base(eight))]
    layouts = layouts_of(outputs)
    flat = flatten(outputs, layouts)
    assert flat == [*four.tensors, bias, *eight.tensors]
    assert unflatten(flat, layouts) == outputs
    needs = [False] * 5 + [True] + [False] * 2
    assert unflatten(needs, layouts) == [Output(Base(False, True)), Output(Base(False))]
    gradients = [Output(Base(None, bias)), Output(Base(None))]
    assert flatten(gradients, layouts) == [None] * 5 + [bias] + [None] * 2


def test_formats_are_hashable_and_compare_by_their_numbers():
    assert len({FourBit(6, 16, "nf4", 64), FourBit(6, 16, "nf4", 64), Affine(6, 16, 8, 1, 16)}) == 2
