"""A server's rules for adapters, from its JSON file in this folder; and the facts that they read.

A condition of a rule is a function of an item, the facts, and the words after the condition.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ...common.text import shown
from ...common.values import must
from ...packing import files
from ...packing.files import CONFIG
from ..config import AdapterConfig, config_of

SERVERS = ("vllm", "sglang", "llama.cpp", "peft")
# SGLang's names of layers that it stacks.
_STACKED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
_STACKED |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
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
        # PEFT nests wrappers: the last weight's is outermost, each inner one adds a .base_layer.
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


def has_other_rank(item: Item, facts: Facts, words: list[str]) -> bool:
    """Whether the tensor's rank isn't the config's."""
    r, shape = facts.config.rank_of(item.name), item.value.shape
    dim = 1 if item.side == "B" else 0  # lora_A [r, in], lora_B [out, r]; in a stack, r times E
    own_r = shape[dim] if dim < len(shape) else 0
    return own_r % r > 0 if item.kind == "stack" else own_r != r


def is_varied(item: Item, facts: Facts, words: list[str]) -> bool:
    """Whether this pattern gives a layer of the adapter another rank or alpha than the default."""
    config, is_rank = facts.config, item.name == "rank_pattern"
    of, default = (config.rank_of, config.r) if is_rank else (config.alpha_of, config.lora_alpha)
    return any(of(name) != default for name in facts.pairs)


def has_other_vocabulary(item: Item, facts: Facts, words: list[str]) -> bool:
    """Whether an embedding's lora_A has another vocabulary than the base."""
    size = item.value.shape[-1]
    return item.side == "A" and size != facts.base.get("vocab_size", size)


def is_single(item: Item, facts: Facts, words: list[str]) -> bool:
    """Whether this layer has a partner without an adapter.

    ``words``: "this:partner", for layers that the server reads together.
    """
    other = dict(word.split(":") for word in words).get(item.last)
    return other is not None and item.name.removesuffix(item.last) + other not in facts.pairs


def is_untargeted(item: Item, facts: Facts, words: list[str]) -> bool:
    """Whether target_modules is a list that lacks one of ``words``, or without words the item."""
    targets, stacked = facts.settings["target_modules"], _STACKED.get(item.last, item.last)
    lasts = {str(name).rpartition(".")[2] for name in targets or ()}
    # SGLang stacks q, k and v, and gate and up: one of them in target_modules stands for all.
    lasts = {_STACKED.get(last, last) for last in lasts}
    return isinstance(targets, list) and not lasts.issuperset(words or [stacked])


def rank_and_limit(facts: Facts, words: list[str]) -> tuple[int, int]:
    """The adapter's largest rank, and max_lora_rank, whose default is in ``words``."""
    largest = max(facts.config.r, *facts.config.rank_pattern.values(), 0)
    return largest, facts.max_lora_rank or int(words[0])


def attention_is(item: Item, facts: Facts, words: list[str]) -> bool:
    """Whether the item is in a decoder layer of Gemma 4 with this kind of attention.

    "reuses": the layer has the keys and values of an earlier layer.  "k_eq_v": its values are its
    keys, before their normalization.
    """
    number = re.search(r"\blayers\.(\d+)\.", item.name)
    if number is None or "num_hidden_layers" not in facts.base:
        return False
    base, i = facts.base, int(number[1])
    if i >= base["num_hidden_layers"] - base.get("num_kv_shared_layers", 0):
        return words == ["reuses"]
    types = base.get("layer_types") or ()
    is_full = types[i : i + 1] == ["full_attention"]
    return words == ["k_eq_v"] and is_full and base.get("attention_k_eq_v", False)


CONDITIONS: dict[str, Callable[[Item, Facts, list[str]], bool]] = {
    "last": lambda item, facts, words: item.last in words,
    "last not": lambda item, facts, words: item.last not in words,
    "base": lambda item, facts, words: facts.base["model_type"] in words,  # "?" if it is unknown
    "base not": lambda item, facts, words: facts.base["model_type"] not in words,
    "wrapper": lambda item, facts, words: facts.base["wrapper"] in words,
    "wrapper not": lambda item, facts, words: facts.base["wrapper"] not in words,
    # A regular expression that occurs in the tensor's key, or in the setting's value.
    "form": lambda item, facts, words: re.search(words[0], item.key or str(item.value)) is not None,
    "on": lambda item, facts, words: item.value not in (None, False, "", [], {}, "none"),
    "half": lambda item, facts, words: len(facts.pairs[item.name]) < 2,
    "integer": lambda item, facts, words: not getattr(item.value.dtype, "is_floating_point", False),
    "other rank": has_other_rank,
    "varied": is_varied,
    "other vocabulary": has_other_vocabulary,
    "incomplete": lambda item, facts, words: item.name.rsplit(".", 2)[0] in facts.incomplete,
    "single": is_single,
    "untargeted": is_untargeted,
    "rank above": lambda item, facts, words: int.__gt__(*rank_and_limit(facts, words)),
    "attention": attention_is,
    "unadapted": lambda item, facts, words: item.name not in facts.pairs,
    "tied": lambda item, facts, words: facts.base.get("tie_word_embeddings", True),  # the default
}


@dataclass(frozen=True, eq=False)
class Rule:
    """A server's treatment of some tensors or settings.

    ``what``: the tensors' kinds, or the settings' names; "pair" is lora_A and lora_B of any kind.
    ``when``: further CONDITIONS, with their words.  ``says``: the reason; {rank} and {limit} in it
    stand for the numbers of "rank above".  ``verdict``: "rejected", "ignored" or
    "unknown".  ``source``: the file in the server's repository that has the rule.  ``mend``: "fix"
    if ``--fix`` mends it, "option" if an option of the server does, or "".
    """

    what: str
    verdict: str
    says: str
    source: str
    todo: str
    mend: str = ""
    when: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        fix = " (--fix does it)" if self.mend == "fix" else ""
        return f"{self.says} [{self.source}]. {self.todo}{fix}."


class Server(SimpleNamespace):
    """A server's rules in order, and the form that ``--fix`` writes for it.

    ``sets``: words that the file's conditions write as @name.  ``stacks``: model_types whose stacks
    of experts the server reads; "*" means all.  ``fuses``: for each fused layer, its name and the
    names of its parts.  ``renames``: new parts of names, by model_type; "" means any model.
    ``roots``: whether names must begin at the model with the head, so with "model.".
    ``copies_keys``: whether values that are keys need a copy of the adapter of k_proj.
    """

    def rule_of(self, item: Item, facts: Facts) -> Rule | None:
        """The first rule for this item; without one, the server loads it."""
        rule = next((rule for rule in self.rules if self._applies(rule, item, facts)), None)
        if rule and "rank above" in rule.when:
            rank, limit = rank_and_limit(facts, rule.when["rank above"].split())
            return replace(rule, says=rule.says.format(rank=rank, limit=limit))
        return rule

    def _applies(self, rule: Rule, item: Item, facts: Facts) -> bool:
        return (item.kind or item.name) in rule.what.replace("pair", PAIRED).split() and all(
            CONDITIONS[name](item, facts, words.split()) for name, words in rule.when.items()
        )


def read_server(name: str) -> Server:
    """The server of this name.  Raises ValueError for a name that isn't in SERVERS."""
    must(name in SERVERS, "server", name, f"one of {', '.join(SERVERS)}")
    text = (Path(__file__).parent / f"{name}.json").read_text()
    sets = json.loads(text)["sets"]
    # "@NAME" in the file stands for the words in sets[NAME].
    values = json.loads(re.sub(r"@(\w+)", lambda found: sets[found[1]], text))
    return Server(name=name, **values | {"rules": [Rule(**row) for row in values["rules"]]})
