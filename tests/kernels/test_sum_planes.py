"""sum_planes: adds the planes that split launches leave, in order."""

import pytest
import torch
from kernel_cases import BF16, DEVICE, F16, F32, dtypes, poisoned

from fastlora.kernels.sum_planes import sum_planes


def planes(*shape):
    return torch.randn(*shape).to(DEVICE)


@dtypes
@pytest.mark.parametrize("size", [1, 7, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_sum(count, size, dtype):
    """Nothing is written around it."""
    parts, memory = planes(count, size), poisoned(size + 200, dtype=dtype)
    sum_planes([parts], [memory[100:-100]])
    torch.testing.assert_close(memory[100:-100], parts.double().sum(0).to(dtype))
    assert memory[:100].isnan().all()
    assert memory[-100:].isnan().all()


def test_several_of_different_sizes_and_dtypes_in_one_launch():
    parts = [planes(3, 5, 7), planes(2, 1025), planes(4, 1), planes(1, 40, 60)]
    outs = [poisoned(5, 7), poisoned(1025, dtype=BF16), poisoned(1, dtype=F16), poisoned(40, 60)]
    sum_planes(parts, outs)
    for part, out in zip(parts, outs, strict=True):
        torch.testing.assert_close(out, part.double().sum(0).to(out.dtype))


def test_planes_are_added_in_order():
    """In float32, adding 1 to 10⁸ loses it unless the large numbers cancel first."""
    out = poisoned(1)
    for numbers, total in (((1e8, -1e8, 1.0), 1.0), ((1e8, 1.0, -1e8), 0.0)):
        sum_planes([torch.tensor(numbers, device=DEVICE).unsqueeze(1)], [out])
        assert out.item() == total


def test_the_sum_is_rounded_once():
    """In bfloat16, 256 + 1 is 256, so rounding each step would lose both ones."""
    out = poisoned(1, dtype=BF16)
    sum_planes([torch.tensor([[256.0], [1.0], [1.0]], device=DEVICE)], [out])
    assert out.item() == 258.0


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_every_number_is_rounded_to_nearest(dtype):
    """Among them zeros, halves of a unit, subnormal numbers, infinities and NaN."""
    bits = torch.randint(-(2**31), 2**31, (1, 5000)).to(torch.int32)
    bits[0, :1000] &= ~0x7FFF  # often exactly between two numbers of bfloat16
    bits[0, 1000:2000] &= ~0x0FFF
    numbers, out = bits.view(F32).to(DEVICE), poisoned(5000, dtype=dtype)
    numbers[0, :4] = torch.tensor([0.0, 1e-40, torch.inf, -torch.inf])
    sum_planes([numbers], [out])
    torch.testing.assert_close(out, numbers[0].to(dtype), rtol=0, atol=0, equal_nan=True)
