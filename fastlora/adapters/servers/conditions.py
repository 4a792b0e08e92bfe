"""Conditions of rules: functions of an item, the facts, and the words after the condition."""

import re
from collections.abc import Callable

from .facts import Facts, Item

# SGLang's names of layers that it stacks.
_STACKED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
_STACKED |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")


def has_other_rank(item: Item, facts: Facts, words: list[str]) -> bool:
    """Whether the tensor's rank isn't the config's."""
    r, shape = facts.config.rank_of(item.name), item.value.shape
    there = shape[0 if item.side == "A" else -1] if shape else 0
    return there % r > 0 if item.kind == "stack" else there != r


def has_other_vocabulary(item: Item, facts: Facts, words: list[str]) -> bool:
    size = item.value.shape[-1]
    return item.side == "A" and size != facts.base.get("vocab_size", size)


def is_single(item: Item, facts: Facts, words: list[str]) -> bool:
    """Whether the server reads this layer together with another, "this:other", without adapter."""
    other = dict(word.split(":") for word in words).get(item.last)
    return other is not None and item.name.removesuffix(item.last) + other not in facts.pairs


def is_untargeted(item: Item, facts: Facts, words: list[str]) -> bool:
    """Whether target_modules is a list without these layers, or without the item's."""
    targets, stacked = facts.settings["target_modules"], _STACKED.get(item.last, item.last)
    lasts = {str(name).rpartition(".")[2] for name in targets or ()}
    lasts = {_STACKED.get(last, last) for last in lasts}
    return isinstance(targets, list) and not lasts.issuperset(words or [stacked])


def has_rank_above(item: Item, facts: Facts, words: list[str]) -> bool:
    """Whether a rank is above max_lora_rank, or above its default."""
    limit = facts.max_lora_rank or int(words[0])
    return max(facts.config.r, *facts.config.rank_pattern.values(), 0) > limit


CONDITIONS: dict[str, Callable[[Item, Facts, list[str]], bool]] = {
    "last": lambda item, facts, words: item.last in words,
    "last not": lambda item, facts, words: item.last not in words,
    "base": lambda item, facts, words: facts.base["model_type"] in words,  # "?" if it is unknown
    "base not": lambda item, facts, words: facts.base["model_type"] not in words,
    # regular expressions in the tensor's key, or in the setting's value
    "form": lambda item, facts, words: re.search(words[0], item.key or str(item.value)) is not None,
    "on": lambda item, facts, words: item.value not in (None, False, "", [], {}, "none"),
    "half": lambda item, facts, words: len(facts.pairs[item.name]) < 2,
    "integer": lambda item, facts, words: not getattr(item.value.dtype, "is_floating_point", False),
    "other rank": has_other_rank,
    "other vocabulary": has_other_vocabulary,
    "incomplete": lambda item, facts, words: item.name.rsplit(".", 2)[0] in facts.incomplete,
    "single": is_single,
    "untargeted": is_untargeted,
    "rank above": has_rank_above,
    "unadapted": lambda item, facts, words: item.name not in facts.pairs,
    "tied": lambda item, facts, words: facts.base.get("tie_word_embeddings", True),  # the default
}
