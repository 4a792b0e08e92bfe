"""Tiny mixtures of experts with packed weights, and the same models with dense weights."""

import pytest
import torch
from moe_models import base_model
from packed import (
    NEEDS_5,
    random_float8,
    random_four_bit,
    random_gguf,
    random_mxfp4,
    random_nvfp4,
    stack,
)
from torch import nn
from transformers import FineGrainedFP8Config

from fastlora.formats.format import Quantized
from fastlora.layers.experts_module import dense_weight, packed_names, read_module, weight_in
from fastlora.layers.frozen import matrix_of
from fastlora.layers.int8 import Int8Linear
from fastlora.layers.packed_experts import take_packed

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason=NEEDS_5)
gguf = pytest.importorskip("transformers.integrations.gguf.utils", reason=NEEDS_5)
SIZES = {"moe_intermediate_size": 32, "intermediate_size": 64}  # whole blocks of every format


def _float8(n: int, k: int) -> Quantized:
    weight = random_float8(n, k, 16, 16, scale=torch.float32)
    weight.tensors[1].mul_(0.1)
    return weight


def _mxfp4(n: int, k: int) -> Quantized:
    format, (packed, scale) = random_mxfp4(n, k)
    return Quantized(format, (packed, torch.randint(121, 125, scale.shape, dtype=torch.uint8)))


def _nvfp4(n: int, k: int) -> Quantized:
    format, (packed, scale, whole) = random_nvfp4(n, k)
    return Quantized(format, (packed, scale, torch.full_like(whole, 0.03)))


def _nf4(n: int, k: int) -> Quantized:
    weight = random_four_bit(n, k, block=32)
    weight.tensors[1].mul_(0.2)
    return weight


FORMATS = {"float8": _float8, "mxfp4": _mxfp4, "nvfp4": _nvfp4, "nf4": _nf4}


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the experts' weights."""
    return [module for module in model.modules() if not read_module(module).reason]


def packed_model(name: str, format: str, implementation: str = "eager", **changes) -> nn.Module:
    """A frozen model with all experts' weights packed."""
    torch.manual_seed(0)
    model = base_model(name, implementation, **SIZES | changes)
    for experts in experts_modules(model):
        weights = {}
        for own in read_module(experts).names:
            count, *shape = getattr(experts, own).shape
            shape = shape[::-1] if experts.is_transposed else shape
            weights[own] = stack([FORMATS[format](*shape) for _ in range(count)])
        take_packed(experts, weights)
    return model


def fp8_model(
    name: str = "qwen3", block=(16, 16), implementation: str = "eager", **how
) -> nn.Module:
    """A model whose experts are transformers' FP8Experts.

    ``how``: scale_fmt and expert_dtype of the config; linears, whether all other linear layers
    except the head are FP8Linear.
    """
    torch.manual_seed(0)
    model = base_model(name, implementation, **SIZES)
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=how.get("scale_fmt", "float"))
    config.expert_dtype = how.get("expert_dtype", "fp8")
    linear = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    model = fp8.replace_with_fp8_linear(
        model, ["lm_head"] if how.get("linears") else linear, config
    )
    for module in model.modules():
        for key, own in list(module._parameters.items()):
            if own is not None and own.is_meta:
                trains = own.is_floating_point()
                module._parameters[key] = nn.Parameter(_numbers(own.shape, own.dtype), trains)
    return model


def gguf_model() -> nn.Module:
    """A model whose experts are transformers' GgufExperts, packed as Q8_0."""
    torch.manual_seed(0)
    model = base_model("qwen3", **SIZES)
    for key, experts in list(model.named_modules()):
        if read_module(experts).reason:
            continue
        (count, rows, inner), act = experts.down_proj.shape, experts.act_fn
        made = gguf.GgufExperts(count, rows, inner, 8, 8, act)
        for name, shape in (("gate_up_proj", (2 * inner, rows)), ("down_proj", (rows, inner))):
            blocks = stack([random_gguf(*shape, "Q8_0") for _ in range(count)]).tensors[0]
            # make the exponent of each block's scale smaller
            blocks.unflatten(2, (-1, 34))[..., 1] &= 0xBB
            getattr(made, name).data = blocks
        model.set_submodule(key, made)
    return model.requires_grad_(False)


def _numbers(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=dtype)
    if dtype == torch.float8_e8m0fnu:
        return torch.randint(120, 124, shape).to(torch.uint8).view(dtype)
    return torch.rand(shape) * 0.05 if dtype == torch.float32 else torch.randn(shape).to(dtype)


def dense_model(packed: nn.Module, name: str, implementation: str = "eager") -> nn.Module:
    """The same model in float32 without packing: each weight as its format defines it."""
    model = base_model(name, implementation, **SIZES)
    there, own = dict(packed.named_modules()), packed.state_dict()
    same = {key: own[key] for key in model.state_dict() if key in own}
    model.load_state_dict({k: v for k, v in same.items() if v.is_floating_point()}, strict=False)
    for key, module in model.named_modules():
        for name_ in packed_names(there[key]):
            dense = dense_weight(there[key], name_, torch.float32)
            getattr(module, name_).data = dense.contiguous()
    return model


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of every weight that fastlora packed, as bytes."""
    weights = {
        f"{key}.{name}": weight_in(module, name)
        for key, module in model.named_modules()
        for name in packed_names(module)
    }
    int8 = {key: each for key, each in model.named_modules() if isinstance(each, Int8Linear)}
    weights |= {key: matrix_of(layer) for key, layer in int8.items()}
    return {
        f"{key}.{i}": tensor.flatten().view(torch.uint8).clone()
        for key, weight in weights.items()
        for i, tensor in enumerate(weight.tensors)
    }
