"""PEFT's keys of an adapter's tensors in a file."""

from collections.abc import Collection, Iterable

from ..layers.modules import full_name
from ..packing.files import PREFIX


def key_of(module: str, parameter: str) -> str:
    """PEFT's key of a module's parameter."""
    return PREFIX + full_name(module, parameter)


def pairs_of(names: Iterable[str], experts: Collection[str]) -> dict[str, tuple[str, str]]:
    """The keys of lora_A and lora_B in a file, by the name of the layer or of the experts' weight.

    PEFT wraps an experts module once for each weight; the last weight's wrapper is the outermost.
    """
    by_module: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0] if name in experts else name
        by_module.setdefault(module, []).append(name)
    pairs = {}
    for module, weights in by_module.items():
        # In a module, down_proj's wrapper is the outermost.  ``outside``: wrappers around this one.
        ordered = sorted(weights, key=lambda name: name.endswith("down_proj"), reverse=True)
        for outside, name in enumerate(ordered):
            layer = ".".join(filter(None, (module, *["base_layer"] * outside)))
            pairs[name] = key_of(layer, "lora_A.weight"), key_of(layer, "lora_B.weight")
    return pairs
