"""Quantized layers of several vendors, made on a CPU; tests of a missing vendor are skipped."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from types import FunctionType, ModuleType

import pytest
import torch
from packed import NEEDS_5, random_gguf, random_int4
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

try:
    from transformers.integrations.gguf.utils import GgufLinear
except ImportError:

    class GgufLinear(nn.Module):
        """A placeholder, because transformers 4 has no such class."""


_AWQ = "gptqmodel.quantization.awq.utils.packing_utils"
# The argument's name in transformers 5 and in transformers 4.
_BIAS = "has_bias" if "has_bias" in signature(FP8Linear).parameters else "bias"


def _torchao(k: int, n: int, dtype: torch.dtype, config: str, **settings) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao isn't installed")
    if "group" in settings:
        settings["granularity"] = quantization.PerGroup(settings.pop("group"))
    linear = nn.Linear(k, n, dtype=dtype)
    quantization.quantize_(linear, getattr(quantization, config)(**settings))
    return linear


def _float8(k: int, n: int, dtype: torch.dtype) -> nn.Module:
    linear = FP8Linear(k, n, block_size=(48, 64), **{_BIAS: True})
    linear.weight.data = torch.randn(n, k).to(torch.float8_e4m3fn)
    linear.weight_scale_inv.data = torch.rand(linear.weight_scale_inv.shape) / 16 + 0.02
    linear.bias.data = torch.randn(n, dtype=dtype)
    return linear


def _gguf(k: int, n: int, dtype: torch.dtype, kind: str) -> nn.Module:
    dequant = pytest.importorskip("transformers.integrations.gguf.dequant", reason=NEEDS_5)
    number = {name: number for number, name in dequant.GGML_NAME.items()}[kind]
    linear = GgufLinear(k, n, number, bias=True)
    linear.weight.data = random_gguf(n, k, kind).tensors[0]
    linear.bias.data = torch.randn(n, dtype=dtype)
    return linear


def _hqq(k: int, n: int, dtype: torch.dtype) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize", reason="HQQ isn't installed")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    return quantize.HQQLinear(nn.Linear(k, n), config, compute_dtype=dtype, device="cpu")


def _gptq(k: int, n: int, dtype: torch.dtype, bits: int = 4, disordered: bool = False) -> nn.Module:
    """A layer of GPTQ-Model's class with random packed values."""
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="needs gptqmodel")
    sizes = {"in_features": k, "out_features": n, "bits": bits, "group_size": 32}
    layer = qlinear.TorchLinear(
        **sizes, sym=False, desc_act=disordered, bias=True, register_buffers=True
    )
    layer.optimized = True  # otherwise the layer compiles its dequantization
    layer.post_init()
    for words in (layer.qweight, layer.qzeros):
        words.copy_(torch.randint(-(2**31), 2**31, words.shape))
    dtype = torch.float16 if dtype == torch.float32 else dtype
    layer.scales = ((torch.rand(layer.scales.shape) + 0.5) / 2**bits / 8).to(dtype)
    layer.bias = torch.randn(n, dtype=dtype)
    if disordered:
        layer.g_idx = layer.g_idx[torch.randperm(k)]
    return layer


def _int4(k: int, n: int, dtype: torch.dtype) -> nn.Module:
    """A layer of torchao's Int4Tensor, made by hand because torchao packs it only on a GPU."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao isn't installed")
    packed = random_int4(n, k, 32, dtype)
    scale, zero = packed.tensors[1] / 16, packed.tensors[2] / 4
    linear = nn.Linear(k, n, dtype=dtype)
    tensor = quantization.Int4Tensor(packed.tensors[0], scale, zero, [1, 32], torch.Size((n, k)))
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    return linear


def _bitsandbytes(k: int, n: int, dtype: torch.dtype, kind: str, **settings) -> nn.Module:
    """A layer of bitsandbytes.  ``dtype``: the dtype that 4-bit layers compute in."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    linear = nn.Linear(k, n)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False, **settings)
    else:
        layer = bnb.nn.Linear4bit(k, n, quant_type=kind, **{"compute_dtype": dtype} | settings)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def dequantized(layer: nn.Module) -> torch.Tensor:
    """The weight dequantized by bitsandbytes itself, in float32."""
    import bitsandbytes as bnb

    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    scale = layer.state.SCB if weight.SCB is None else weight.SCB
    return bnb.functional.int8_vectorwise_dequant(weight.data, scale)


def repack(layer: nn.Module) -> None:
    """Repack the weight for a CPU kernel without gradients.

    bitsandbytes does so in an evaluation call on a CPU with AVX512-BF16.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as packed_for_cpu

    weight = layer.weight
    weight.data, weight.quant_state = packed_for_cpu(weight.data, weight.quant_state)


def _rotated_int8(k: int, n: int, dtype: torch.dtype) -> nn.Module:
    from fastlora.layers.int8 import int8_linear  # late: benchmarks also use an older fastlora

    return int8_linear(nn.Linear(k, n, dtype=dtype))


def _as_if_in(name: str) -> Callable[[type], type]:
    """Decorate a stand-in for a class of this module, whose package the tests don't need."""

    def move(kind: type) -> type:
        forward = FunctionType(kind.forward.__code__, globals() | {"__name__": name})
        forward.__qualname__ = kind.forward.__qualname__
        kind.__module__, kind.forward = name, forward
        return kind

    return move


@_as_if_in("unsloth_zoo.cpu.ops")
class Bf16StoredLinear(nn.Linear):
    """A stand-in for Unsloth's layer of a CPU: the weight is cast to x's dtype in each call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def _stored(k: int, n: int, dtype: torch.dtype) -> nn.Module:
    layer = Bf16StoredLinear(k, n, dtype=dtype)
    layer.weight.data = layer.weight.data.bfloat16()
    return layer


def dequantize_gemm(qweight, qzeros, scales, bits, group_size):
    """GPTQ-Model's weight [in_features, out_features] of an AWQ layer."""
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32)
    codes, zeros = ((words[..., None] >> shifts & 15).flatten(1) for words in (qweight, qzeros))
    numbers = codes - zeros.repeat_interleave(group_size, 0)
    return numbers * scales.repeat_interleave(group_size, 0)


if not find_spec("gptqmodel"):
    sys.modules[_AWQ] = ModuleType(_AWQ)
    sys.modules[_AWQ].dequantize_gemm = dequantize_gemm


@_as_if_in("gptqmodel.nn_modules.qlinear.torch_awq")
class AwqTorchLinear(nn.Module):
    """A stand-in for GPTQ-Model's AWQ layer, with random packed values."""

    def __init__(self, k: int, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        import_module(_AWQ)
        self.in_features, self.out_features, self.bits, self.adapter = k, n, 4, None
        groups, dtype = k // 32, torch.float16 if dtype == torch.float32 else dtype
        for name, rows in (("qweight", k), ("qzeros", groups)):
            self.register_buffer(name, torch.randint(-(2**31), 2**31, (rows, n // 8)).int())
        self.register_buffer("scales", ((torch.rand(groups, n) + 0.5) / 64).to(dtype))
        self.register_buffer("bias", torch.randn(n).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = dequantize_gemm(self.qweight, self.qzeros, self.scales, 4, 32).T
        return nn.functional.linear(x, weight.to(x.dtype), self.bias.to(x.dtype))


# Kind of layer: the function that makes it from (k, n, dtype).
_MAKERS = {
    "torchao-int8": lambda *args: _torchao(*args, "Int8WeightOnlyConfig"),
    "torchao-int4": lambda *args: _torchao(
        *args, "IntxWeightOnlyConfig", weight_dtype=torch.int4, group=32
    ),
    "torchao-float8": lambda *args: _torchao(*args, "Float8WeightOnlyConfig"),
    "torchao-rounding": lambda *args: _torchao(*args, "Int8DynamicActivationInt8WeightConfig"),
    "float8": _float8,
    "gguf-q8_0": lambda *args: _gguf(*args, "Q8_0"),
    "gguf-q4_k": lambda *args: _gguf(*args, "Q4_K"),
    "torchao-int4-packed": _int4,
    "hqq": _hqq,
    "gptq": _gptq,
    "awq": AwqTorchLinear,
    "stored": _stored,
    "rotated-int8": _rotated_int8,
}
# Without "torchao-rounding", whose layers give no gradient, and fastlora's own.
KINDS = [kind for kind in _MAKERS if kind not in ("torchao-rounding", "rotated-int8")]
BITSANDBYTES = ["nf4", "fp4", "int8"] if find_spec("bitsandbytes") else []


def quantized(kind: str, k: int = 256, n: int = 96, dtype: torch.dtype = torch.float32, **settings):
    """A frozen layer of random weights with a bias.  Each GGUF type has a kind ``gguf-<type>``."""
    if kind in ("nf4", "fp4", "int8"):
        return _bitsandbytes(k, n, dtype, kind, **settings).requires_grad_(False)
    if kind not in _MAKERS and kind.startswith("gguf-"):
        return _gguf(k, n, dtype, kind.removeprefix("gguf-").upper()).requires_grad_(False)
    return _MAKERS[kind](k, n, dtype, **settings).requires_grad_(False)
