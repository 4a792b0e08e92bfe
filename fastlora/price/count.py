"""What can be counted from shapes alone, on meta tensors too: parameters, bytes, FLOPs."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..base import matrix_of, why_not_class
from ..model.config import LoRAConfig
from ..model.targets import find_targets, modules_to_save
from ..quant import PackedLayer, quantised_weight
from .record import FrozenCosts, Price


def count_frozen(model: nn.Module) -> FrozenCosts:
    """The model's parameters, and the FLOPs of its linear layers."""
    matrices = list(_matrices(model))
    weights = sum(math.prod(weight.shape) for _, weight in matrices)
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for layer, weight in matrices:
        if not isinstance(weight, Tensor):  # what it is packed in has other numbers of elements
            for name in layer._parameters.keys() - {"bias"}:
                sizes.pop(id(layer._parameters[name]), None)
            sizes[id(layer)] = math.prod(weight.shape)
    return FrozenCosts(sum(sizes.values()), 4 * weights)


def count_adapter(model: nn.Module, config: LoRAConfig) -> tuple[int, Price]:
    """How many layers ``config`` targets, and the counted price of their adapters.

    Raises what :func:`fastlora.apply_lora` raises for a config that doesn't fit the model.
    """
    parameters = size = flops = 0
    saved = modules_to_save(model, config, every_name=True)
    targets, experts = find_targets(model, config, saved, every_name=True)
    if experts:
        raise ValueError(
            f"a plan prices linear layers, and not experts such as {next(iter(experts))}: leave "
            "them out of target_parameters"
        )
    for name, layer in targets.items():
        weight, r = matrix_of(layer), config.rank_of(name)
        count = r * sum(weight.shape)
        parameters += count
        size += count * torch.promote_types(weight.dtype, torch.float32).itemsize
        # A multiplication and an addition for each, in three products of either matrix: h and y;
        # dh and the adapter's part of dx; both gradients.
        flops += 2 * 3 * count
    return len(targets), Price(config.r, parameters, size, flops)


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every linear layer, and its weight, which may be packed."""
    for module in model.modules():
        packed = isinstance(quantised_weight(module), PackedLayer)
        if packed or not why_not_class(type(module)):
            yield module, matrix_of(module)
