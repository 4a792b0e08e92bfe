"""The facts of a saved adapter that servers' rules read: its settings, and headers of tensors."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...common.text import shown
from ...packing import files
from ...packing.files import CONFIG
from ..config import AdapterConfig
from ..peft_config import config_of

# kind of tensor -> form of its keys.  The first match counts, and its group is the tensor's name.
_KINDS = {
    "expert": r"(.*\.experts\.\d+\..*)\.lora_[AB]\.weight",
    "head": r"(.*\b(?:lm_head|unembed_tokens))\.lora_[AB]\.weight",
    "lora": r"(.*)\.lora_[AB]\.weight", "embedding": r"(.*)\.lora_embedding_[AB]",
    "bias_of_b": r"(.*)\.lora_[AB]\.bias", "magnitude": r"(.*)\.lora_magnitude_vector.*",
    "copy": r"(.*)\.base_layer\.weight", "full": r"(.*?)(?:\.base_layer)?(?:\.\w+)?",
}  # fmt: skip
PAIRED = "lora expert head stack embedding"  # the kinds of lora_A and lora_B
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Item(NamedTuple):
    """A tensor, a setting, or a name in target_modules.

    A lora_A or lora_B has one of five kinds: "head" (an output head), "expert" (a layer of one
    expert), "stack" (a weight of all experts, which target_parameters names), "embedding", or
    "lora" (any other layer).  A "copy" is a frozen tensor of the base, "full" a tensor that trained
    in full.
    """

    name: str  # of the module, of the experts' weight, or of the setting
    kind: str  # a key of _KINDS, or "stack"; "" for a setting; "target" in target_modules
    value: Any  # the tensor's dtype and shape (``Planned``), or the setting's value
    key: str = ""  # the tensor's key in the file
    rule: Any = None  # the server's Rule, or None if the server loads it

    @property
    def last(self) -> str:
        """The last part of the name, such as "q_proj"."""
        return self.name.rpartition(".")[2]

    @property
    def side(self) -> str:
        """The letter "A" or "B" of lora_A or lora_B."""
        return self.key.removesuffix(".weight")[-1]


class Facts(NamedTuple):
    """An adapter, with the config of its base model if it is known."""

    path: Path
    settings: dict[str, Any]
    config: AdapterConfig  # only ranks and scales
    items: list[Item]
    pairs: dict[str, dict[str, Item]]  # the items of lora_A and lora_B, by name and side
    # The config of the base's language model.  "wrapper" is the model_type of a multimodal model
    # around it, "none" for a text model, and "?" without a config.
    base: dict[str, Any]
    incomplete: set[str]  # modules of experts with "expert" items for only some of their layers
    max_lora_rank: int | None


def read_facts(folder: str | os.PathLike, base: Any, max_lora_rank: int | None) -> Facts:
    """Read an adapter's config and the header of its weights; no tensor is loaded.

    Raises the errors of ``load_adapter`` for a folder, and ValueError for a base without a
    model_type.
    """
    (path, settings, header), base = files.read_adapter(folder), _base(base)
    config = config_of(settings, str(path / CONFIG))
    items = [Item(name, "", value) for name, value in settings.items()]
    if isinstance(targets := settings.setdefault("target_modules", None), list):
        items += [Item(str(name), "target", None) for name in targets]
    items += [_item(key, planned, config) for key, planned in header.items()]
    pairs: dict[str, dict[str, Item]] = {}
    for item in items:
        if item.kind in PAIRED.split():
            pairs.setdefault(item.name, {})[item.side] = item
    numbers = re.findall(r"(\S*\.experts)\.(\d+)\.", "\n".join(pairs))
    counts = [count for each in _COUNTS if isinstance(count := base.get(each), int)]
    experts = max([0, *counts, *(int(n) + 1 for _, n in numbers)])
    layers = Counter(module for module, _ in numbers)
    # A complete module has gate, up and down of each expert.
    incomplete = {module for module, count in layers.items() if count < 3 * experts}
    return Facts(path, settings, config, items, pairs, base, incomplete, max_lora_rank)


def _item(key: str, header: Any, config: AdapterConfig) -> Item:
    found = ((kind, re.fullmatch(form, key)) for kind, form in _KINDS.items())
    kind, name = next((kind, files.name_of(match[1])) for kind, match in found if match)
    module = re.sub(r"(\.base_layer)+$", "", name)
    weights, outside = config.weights_in(module), name.count(".base_layer")
    if kind == "lora" and outside < len(weights):
        return Item(weights[-1 - outside], "stack", header, key)
    return Item(name, kind, header, key)


def _base(base: Any) -> dict[str, Any]:
    """The base's ``Facts.base``; without a base, the model_type is also "?"."""
    config: Any = {"model_type": "?"} if base is None else files.read_config(base)
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"base is {shown(base)}, but its config must have a model_type")
    text = config.get("text_config") or {}
    wrapper = config["model_type"] if text or base is None else "none"
    return {**config, **text, "wrapper": wrapper}
