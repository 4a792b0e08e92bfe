"""A server's rules for adapters, read from its JSON file in this folder.

A condition of a rule is a function of an item, the facts, and the words after the condition.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

from ...common.values import must
from .facts import PAIRED, Facts, Item

SERVERS = ("vllm", "sglang", "llama.cpp", "peft")
# SGLang's names of layers that it stacks.
_STACKED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
_STACKED |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")


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
    values = json.loads(re.sub(r"@(\w+)", lambda found: sets[found[1]], text))
    return Server(name=name, **values | {"rules": [Rule(**row) for row in values["rules"]]})
