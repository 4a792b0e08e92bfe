"""bitsandbytes' layers, quantised on a CPU; importing this skips a test file that has none."""

import pytest
import torch
from torch import nn

bnb = pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "fp4", "int8")


def quantised(kind: str, k: int = 128, n: int = 64, dtype=torch.float32, **settings) -> nn.Linear:
    """A layer of random weights, with a bias; ``dtype`` is that in which 4 bits compute."""
    linear = nn.Linear(k, n)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False, **settings)
    else:
        settings.setdefault("compute_dtype", dtype)
        layer = bnb.nn.Linear4bit(k, n, quant_type=kind, **settings)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def dequantised(layer: nn.Module) -> torch.Tensor:
    """By bitsandbytes itself, in float32."""
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    scale = layer.state.SCB if weight.SCB is None else weight.SCB
    return bnb.functional.int8_vectorwise_dequant(weight.data, scale)


def repack(layer: nn.Module) -> None:
    """As a call in evaluation does on a CPU with AVX512-BF16: for a kernel without gradients."""
    own = layer.weight
    own.data, own.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        own.data, own.quant_state
    )
