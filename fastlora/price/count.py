"""What can be counted from shapes alone, on meta tensors too: parameters, bytes, FLOPs."""

import math
from collections.abc import Iterator

from torch import Tensor, nn

from ..adapted import wide_dtype
from ..base import matrix_of, tensor_of, why_not_class
from ..experts import Experts, read_experts_module
from ..model.config import LoRAConfig
from ..model.targets import find_targets, modules_to_save
from ..quant import PackedLayer, quantised_weight
from .record import FrozenCosts, Price

# What configs of transformers' call the number of experts that a token goes to.
_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")


def count_frozen(model: nn.Module) -> FrozenCosts:
    """The model's parameters, and the FLOPs of its linear layers, and of a token's experts."""
    matrices = list(_matrices(model))
    weights = sum(math.prod(weight.shape) for _, weight in matrices)
    for module in model.modules():
        read = read_experts_module(module, type(module))
        used = 0 if read.reason else _experts_of_a_token(module, read)
        for name in read.names if used else ():
            weights += used * math.prod(tensor_of(module, name).shape[1:])
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for layer, weight in matrices:
        if not isinstance(weight, Tensor):  # what it is packed in has other numbers of elements
            for name in layer._parameters.keys() - {"bias"}:
                sizes.pop(id(layer._parameters[name]), None)
            sizes[id(layer)] = math.prod(weight.shape)
    return FrozenCosts(sum(sizes.values()), 4 * weights)


def count_adapter(model: nn.Module, config: LoRAConfig) -> tuple[int, Price]:
    """How many layers and experts' weights ``config`` targets, and their adapters' counted price.

    Raises what :func:`fastlora.apply_lora` raises for a config that doesn't fit the model, and
    ValueError for experts of whom nothing says how many a token goes to.
    """
    parameters = size = flops = 0
    saved = modules_to_save(model, config, every_name=True)
    targets, experts = find_targets(model, config, saved, every_name=True)
    for name, layer in targets.items():
        weight, r = matrix_of(layer), config.rank_of(name)
        count = r * sum(weight.shape)
        parameters += count
        size += count * wide_dtype(weight).itemsize
        # A multiplication and an addition for each, in three products of either matrix: h and y;
        # dh and the adapter's part of dx; both gradients.
        flops += 2 * 3 * count
    for name, target in experts.items():
        used = _experts_of_a_token(
            target.module, read_experts_module(target.module, type(target.module))
        )
        if not used:
            raise ValueError(
                f"{name} has no price: its config doesn't say how many experts a token goes to "
                f"({_PER_TOKEN[0]})"
            )
        _, p, q, _ = target.features
        own = config.rank_of(name) * (p + q)  # an expert's
        count = own * target.features.experts
        parameters += count
        size += count * wide_dtype(target.weight).itemsize
        flops += 2 * 3 * used * own
    return len(targets) + len(experts), Price(config.r, parameters, size, flops)


def _experts_of_a_token(module: nn.Module, read: Experts) -> int:
    """How many run for each token; 0 where nothing says so."""
    if not read.routed:
        return len(tensor_of(module, read.names[0]))
    found = [getattr(module.config, name, None) for name in _PER_TOKEN]
    return next((number for number in found if type(number) is int), 0)


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every linear layer, and its weight, which may be packed."""
    for module in model.modules():
        packed = isinstance(quantised_weight(module), PackedLayer)
        if packed or not why_not_class(type(module)):
            yield module, matrix_of(module)
