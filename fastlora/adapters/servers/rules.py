"""A server's rules for adapters, read from its JSON file in this folder."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from .conditions import CONDITIONS
from .facts import PAIRED, Facts, Item

SERVERS = ("vllm", "sglang", "llama.cpp", "peft")


@dataclass(frozen=True, eq=False)
class Rule:
    """A server's treatment of some tensors or settings.

    ``what``: their kinds, or the settings' names; "pair" is lora_A and lora_B of any kind.
    ``when``: further conditions of conditions.py, with their words.  ``verdict``: "rejected",
    "ignored" or "unknown".  ``source``: a file in the server's repository.  ``mend``: "fix" for
    ``--fix``, "option" for an option of the server, or nothing.
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
    of experts it reads, or "*".  ``fuses``: lists of a layer and its parts.  ``renames``: new
    parts of names, by model_type; "" means any model.  ``roots``: whether names must begin at the
    model with the head.
    """

    def rule_of(self, item: Item, facts: Facts) -> Rule | None:
        """The first rule for this item; without one, the server loads it."""
        return next((rule for rule in self.rules if self._applies(rule, item, facts)), None)

    def _applies(self, rule: Rule, item: Item, facts: Facts) -> bool:
        return (item.kind or item.name) in rule.what.replace("pair", PAIRED).split() and all(
            CONDITIONS[name](item, facts, words.split()) for name, words in rule.when.items()
        )


def read_server(name: str) -> Server:
    """The server of this name.  Raises ValueError for a name that isn't in SERVERS."""
    if name not in SERVERS:
        raise ValueError(f"server is {name!r}, but must be one of {', '.join(SERVERS)}")
    text = (Path(__file__).parent / f"{name}.json").read_text()
    sets = json.loads(text)["sets"]
    values = json.loads(re.sub(r"@(\w+)", lambda found: sets[found[1]], text))
    return Server(name=name, **values | {"rules": [Rule(**row) for row in values["rules"]]})
