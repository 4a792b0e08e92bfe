"""Experts' adapters in PEFT's files: their keys, and which side is which in older ones.

PEFT nests a layer for each weight of an experts module, the last one outermost.  Which side of a
weight it takes for the inputs has changed: 0.18 took the second dimension, 0.19.0 the last one of a
module that is_transposed, and since 0.19.1 it is the last one of the others.  A file of the other
order holds the same product with its factors swapped.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from ..expert_weight import Features
from .files import Stored


class Pair(NamedTuple):
    """The keys of one weight's lora_A and lora_B in a file."""

    lora_a: str
    lora_b: str


def nested_names(names: Iterable[str]) -> dict[str, str]:
    """PEFT's name of the layer of each weight of experts, by the weight's name."""
    by_module: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: ".".join([*([module] if module else []), *["base_layer"] * outside])
        for module, own in by_module.items()
        for name, outside in zip(own, reversed(range(len(own))), strict=True)
    }


def reversed_pairs(
    experts: Mapping[Pair, Features], stored: Mapping[str, Stored], version: object
) -> dict[Pair, Features]:
    """Those that the file has in the other order, which its shapes tell, or PEFT's version.

    ``version``: as adapter_config.json has it, None where it has none.
    """
    found = {}
    for pair, features in experts.items():
        if not all(key in stored and len(stored[key].shape) == 2 for key in pair):
            continue
        sides = stored[pair.lora_a].shape[1], stored[pair.lora_b].shape[0]
        same, other = (features.p, features.q), (features.q, features.p)
        if sides == other and (same != other or _was_other(version, features.is_transposed)):
            found[pair] = features
    return found


def _was_other(version: object, is_transposed: bool) -> bool:
    """Whether PEFT of this version had the other order for such a module."""
    numbers = re.match(r"(\d+)\.(\d+)\.?(\d*)", version if isinstance(version, str) else "")
    if numbers is None:
        return False
    release = tuple(int(number or 0) for number in numbers.groups())
    if release >= (0, 19, 1):
        return False
    return True if release >= (0, 19, 0) else not is_transposed


def turned_shapes(pairs: Iterable[Pair], stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The header as it would be in today's order."""
    turned = dict(stored)
    for a, b in pairs:
        turned[a] = stored[a]._replace(shape=stored[b].shape[::-1])
        turned[b] = stored[b]._replace(shape=stored[a].shape[::-1])
    return turned


def turn(pairs: Mapping[Pair, Features], tensors: dict[str, Tensor]) -> None:
    """Bring the file's tensors into today's order."""
    for (a, b), features in pairs.items():
        lora_a, lora_b = tensors[a], tensors[b]
        thin = lora_a.view(features.experts, -1, lora_a.shape[1])  # [E, r, q]
        wide = lora_b.view(lora_b.shape[0], -1, features.experts)  # [p, r, E]
        tensors[a] = wide.permute(2, 1, 0).reshape(lora_a.shape[0], -1)
        tensors[b] = thin.permute(2, 1, 0).reshape(lora_a.shape[1], -1)
