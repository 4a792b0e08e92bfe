"""Compare the layer with its formula in float64; on a CPU with TRITON_INTERPRET=1."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "torch-ext"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "transposed"])
def test_lora_linear(dtype, has_bias, is_transposed):
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    device = "cpu" if INTERPRETED else "cuda"
    layer = importlib.import_module("fastlora_kernels").layers.LoRALinear()
    shapes = {"weight": (48, 40), "lora_A": (8, 40), "lora_B": (48, 8), "bias": (48,)}
    for name, shape in shapes.items():
        setattr(layer, name, torch.randn(shape, device=device, dtype=dtype))
    layer.scaling = 2.0
    if not has_bias:
        layer.bias = None
    x, dy = (torch.randn(2, 17, n, device=device, dtype=dtype) for n in (40, 48))
    if is_transposed:
        x, dy = x[0].T.contiguous().T, dy[0]
    trained = [each.requires_grad_() for each in (x, layer.lora_A, layer.lora_B)]
    y = layer(x)
    made = [y, *torch.autograd.grad(y, trained, dy)]

    x64, a, b = (each.detach().double().requires_grad_() for each in trained)
    wanted = x64 @ layer.weight.double().T + 2.0 * x64 @ a.T @ b.T
    if has_bias:
        wanted = wanted + layer.bias.double()
    wanted = [wanted, *torch.autograd.grad(wanted, (x64, a, b), dy.double())]
    for ours, exact in zip(made, wanted, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - exact).norm() / exact.norm()
        assert error < TOLERANCE[dtype]


@pytest.mark.kernels_ci
def test_a_weight_that_trains_is_refused():
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    layer = importlib.import_module("fastlora_kernels").layers.LoRALinear()
    layer.weight, layer.bias = torch.nn.Parameter(torch.ones(2, 2)), None
    with pytest.raises(ValueError, match="frozen"):
        layer(torch.ones(1, 2))
