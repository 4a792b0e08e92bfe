"""Small layers, forward and backward, against the oracle; and PEFT's own against optimised ones."""

import sys
from typing import Any

import torch

from .. import reference
from ..backends import use_backend
from ..layers.linear import LoRALinear
from ..peft.check import Check, check

# The relative error that is taken for rounding: four times the dtype's epsilon, and for float32
# that of TF32, in which a GPU may multiply it.
TOLERANCES = {torch.float32: 2**-8, torch.bfloat16: 2**-5, torch.float16: 2**-8}
_M, _K, _N, _R = 33, 40, 24, 4
_SMALL: dict[str, dict[str, Any]] = {  # what PEFT may come to mean otherwise, by its settings
    "LoRA": {},
    "with dropout and rsLoRA": {"lora_dropout": 0.5, "use_rslora": True},
    "with biases": {"bias": "all", "lora_bias": True},
    "DoRA": {"use_dora": True},
}


def relative_errors(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """‖ours - oracle's‖ / ‖oracle's‖ of the output and of every gradient, by name."""
    draw = torch.Generator().manual_seed(0)
    layer = LoRALinear(_K, _N, r=_R, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    x, dy = (torch.randn(_M, size, generator=draw).to(device, dtype) for size in (_K, _N))
    leaves = [x.requires_grad_(), layer.lora_A, layer.lora_B]
    with use_backend(backend):
        y = layer(x)
        ours = [y, *torch.autograd.grad(y, leaves, dy)]
    x, lora_a, lora_b, weight, bias, dy = map(_exact, (*leaves, layer.weight, layer.bias, dy))
    y = reference.lora_linear(x, weight, lora_a, lora_b, bias=bias, scale=layer.scaling)
    truth = [y, *torch.autograd.grad(y, (x, lora_a, lora_b), dy)]
    names = ("the output", "dx", "d lora_A", "d lora_B")
    return {
        name: float((_exact(our) - true).norm().detach() / true.norm().detach())
        for name, our, true in zip(names, ours, truth, strict=True)
    }


def peft_checks() -> dict[str, Check]:
    """What :func:`fastlora.check` says of small layers of the PEFT that is imported."""
    peft, found = sys.modules["peft"], {}
    for what, settings in _SMALL.items():
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(0)
            config = peft.LoraConfig(
                r=_R, lora_alpha=5, target_modules=["0"], init_lora_weights=False, **settings
            )
            layer = torch.nn.Sequential(torch.nn.Linear(_K, _N))
            model = peft.get_peft_model(layer, config).train()
            found[what] = check(model, torch.randn(_M, _K, requires_grad=True))
    return found


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf with the same numbers, in float64 on the CPU, where all have it."""
    return tensor.detach().cpu().double().requires_grad_()
