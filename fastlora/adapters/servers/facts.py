"""The facts on a saved adapter that the rules of servers read: settings, and headers of tensors."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...model.adapter_config import config_of
from ...model.config import LoRAConfig
from ...model.files import CONFIG, WEIGHTS, check_files, check_folder, read_header, read_json
from ...model.tensors import name_of
from ...text import shown
from ..stored import weights_in

# The kinds of tensors, by the ends of their keys; the first match counts.
_KINDS = {
    "embedding": r"\.lora_embedding_[AB]", "magnitude": r"\.lora_magnitude_vector(\.weight)?",
    "bias_of_b": r"\.lora_[AB]\.bias", "lora": r"\.lora_[AB]\.weight",
    "copy": r"\.base_layer\.weight", "base_bias": r"(\.base_layer)?\.bias", "full": r"(\.\w+)?",
}  # fmt: skip
PAIRED = "lora expert head stack embedding"  # the kinds of lora_A and lora_B
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.")
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Item(NamedTuple):
    """A tensor, a setting that is switched on, or a name in target_modules.

    Kinds of lora_A and lora_B: "head" of an output head, "expert" of one expert's layer, "stack" of
    the weights of all experts, which target_parameters names, "embedding", and "lora" of any other
    layer.  A "copy" is a frozen tensor of the base.
    """

    name: str  # of the module, of the experts' weight, or of the setting
    kind: str  # a key of _KINDS, or of PAIRED; "" for a setting; "target" in target_modules
    value: Any  # the tensor's Planned, or the setting's value
    key: str = ""  # the tensor's key in the file

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def side(self) -> str:
        """ "A" or "B", for lora_A or lora_B."""
        return self.key.removesuffix(".weight")[-1]


class Facts(NamedTuple):
    """An adapter, with the config of its base model if it is known."""

    path: Path
    settings: dict[str, Any]
    config: LoRAConfig  # only ranks and scales
    items: list[Item]
    pairs: dict[str, dict[str, Item]]  # the items of lora_A and lora_B, by name and side
    base: Mapping[str, Any]  # the base model's config, or an empty one
    kind: str  # the model_type of the base's language model, or "?"
    incomplete: set[str]  # modules with adapters of single experts, but not on all of their layers
    max_lora_rank: int | None


def read_facts(folder: str | os.PathLike, base: Any, max_lora_rank: int | None) -> Facts:
    """Read an adapter's config and the header of its weights; no tensor is loaded.

    Raises the errors of ``load_adapter`` for a folder, and ValueError for a base without a
    model_type.
    """
    path, base = check_folder(folder), {} if base is None else _base(base)
    check_files(path)
    settings, kind = read_json(path / CONFIG), base.get("model_type", "?").removesuffix("_text")
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise ValueError(f"{path / CONFIG} is not a PEFT config: it has no peft_type")
    config = config_of({k: v for k, v in settings.items() if k in _READ}, str(path / CONFIG))
    items = [
        Item(name, "", value)
        for name, value in {"target_modules": None, **settings}.items()
        if value not in (None, False, "", [], {}) or name in ("target_modules", "lora_alpha")
    ]
    if isinstance(targets := settings.get("target_modules"), list):
        items += [Item(str(name), "target", None) for name in targets]
    items += [_item(key, header, config) for key, header in read_header(path / WEIGHTS).items()]
    pairs: dict[str, dict[str, Item]] = {}
    for item in items:
        if item.kind in PAIRED.split():
            pairs.setdefault(item.name, {})[item.side] = item
    found = [match for match in map(_EXPERT.match, pairs) if match]
    experts = next((base[each] for each in _COUNTS if each in base), 0)
    experts = max([experts, *(int(match[2]) + 1 for match in found)])
    layers = Counter(match[1] for match in found)
    incomplete = {module for module, count in layers.items() if count < 3 * experts}
    return Facts(path, settings, config, items, pairs, base, kind, incomplete, max_lora_rank)


def _item(key: str, header: Any, config: LoRAConfig) -> Item:
    ends = ((kind, re.search(f"{end}$", key)) for kind, end in _KINDS.items())
    kind, name = next((kind, name_of(key[: end.start()])) for kind, end in ends if end)
    module = re.sub(r"(\.base_layer)+$", "", name)
    if kind == "lora" and (weights := weights_in(module, config.target_parameters)):
        return Item(weights[-1 - name.count(".base_layer")], "stack", header, key)
    if kind == "lora" and _EXPERT.match(name):
        kind = "expert"
    elif kind == "lora" and re.search(r"\b(lm_head|unembed_tokens)$", name):
        kind = "head"
    return Item(name, kind, header, key)


def _base(base: Any) -> Mapping[str, Any]:
    if isinstance(base, str | os.PathLike):
        base = read_json(Path(base) / "config.json" if Path(base).is_dir() else Path(base))
    config = base.to_dict() if hasattr(base, "to_dict") else base
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"base is {shown(base)}, but must be a model's config with a model_type")
    return {**config, **(config.get("text_config") or {})}
