"""What a call keeps for its backward: x, the parameters, h and the seed, and nothing else."""

import pytest
import torch
from judge import make_projection
from memory import saved_bytes

import fastlora
from fastlora.backends import find_backend

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_saves_x_and_h_only(p, adapter_dtype):
    x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    group = [make_projection(32, 128, r, torch.bfloat16, adapter_dtype, bias=True) for r in (4, 8)]
    given = [x, *(tensor for projection in group for tensor in projection[:4])]
    storages = saved_bytes(lambda: fastlora.lora_linears(x, group, dropout=p), apart_from=given)
    seed, of_h = 2 * 8 if p else 0, find_backend().h_dtype(x.dtype, x.device).itemsize
    assert sum(storages.values()) == 64 * (4 + 8) * of_h + seed


def test_saved_tensors_are_not_written_over():
    x = torch.randn(16, 12, requires_grad=True)
    weight, lora_a, lora_b, *_ = make_projection(8, 12, 4, torch.float32)
    given = (x, weight, lora_a, lora_b)
    before = [tensor.clone() for tensor in given]
    y = fastlora.lora_linear(*given, dropout=0.3)
    first = torch.autograd.grad(y.sum(), (x, lora_a, lora_b), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), (x, lora_a, lora_b))))
    assert all(map(torch.equal, before, given))
