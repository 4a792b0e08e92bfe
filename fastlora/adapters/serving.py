"""Check whether a server loads an adapter, and rewrite it if not: ``fastlora.check_adapter``."""

import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..layers.modules import some
from ..packing.files import check_folder, name_of, write_adapter
from .servers.rules import SERVERS as SERVERS
from .servers.rules import Facts, Item, Server, read_facts, read_server


@dataclass(frozen=True)
class AdapterReport:
    """A finding for each tensor and setting of an adapter.  Prints a line for each rule that fits.

    With ``fix``, ``fixed`` is the report on the written adapter, and ``note`` says where it was
    written, or why it wasn't.
    """

    server: Server
    findings: tuple[Item, ...]  # each with the rule that applies to it, or None
    fixed: "AdapterReport | None" = None
    note: str = ""

    @property
    def loads(self) -> bool:
        """Whether the server loads the whole adapter."""
        return all(item.rule is None for item in self.findings)

    def __str__(self) -> str:
        verb = "loads" if self.loads else "doesn't load"
        lines = [f"{self.server.name} {self.server.version} {verb} the whole adapter"]
        rules = dict.fromkeys(item.rule for item in self.findings)
        for rule in sorted(rules, key=lambda rule: rule is None):
            names = _names([item for item in self.findings if item.rule is rule])
            lines.append(f"  {rule.verdict}: {names}: {rule}" if rule else f"  loads: {names}")
        return "\n".join(filter(None, [*lines, self.note]))


def _names(items: list[Item]) -> str:
    """The names of the items' tensors, with * for numbers, and their count.

    Without tensors among the items, these are the names of the settings.
    """
    items = [item for item in items if item.key] or items
    names = dict.fromkeys(re.sub(r"\b\d+\b", "*", name_of(i.key or i.name)) for i in items)
    return some([*names]) + (f" ({len(items)} tensors)" if items[0].key and items[1:] else "")


def check_adapter(
    folder: str | os.PathLike,
    server: str,
    base: Any = None,
    *,
    fix: str | os.PathLike | None = None,
    max_lora_rank: int | None = None,
) -> AdapterReport:
    """Say which tensors and settings of a saved adapter a server loads, rejects or ignores.

    ``server``: "vllm", "sglang", "llama.cpp" or "peft".  ``base``: the base model's transformers
    config, its config.json, or the folder that holds it; without it, findings that depend on the
    model are "unknown".  ``max_lora_rank``: the server's option; by default its own default.  Only
    the config and the header of the weights are read.

    ``fix``: a new folder, where an adapter is written that computes the same and that the server
    loads whole.  Its ranks and scales are uniform.  Nothing is written if a rewrite can't mend a
    finding, unless an option of the server does.  The input never changes.

    Returns a report, which prints one line for each rule.  Raises the errors of
    :func:`fastlora.load_adapter` for a folder, FileExistsError if ``fix`` exists, and ValueError
    for an unknown server or a base without a model_type.
    """
    rules, output = read_server(server), None if fix is None else check_folder(fix)
    report = _judge(rules, facts := read_facts(folder, base, max_lora_rank))
    if output is None:
        return report
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists: give a new folder")
    if left := [item for item in report.findings if item.rule and not item.rule.mend]:
        return replace(report, note=f"nothing was written: --fix can't mend {_names(left)}")
    from .servers.mend import mended  # late, because only a mend reads tensors

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fastlora-", dir=output.parent) as scratch:
        made = Path(scratch) / "adapter"
        write_adapter(made, *mended(facts, rules))
        fixed = _judge(rules, read_facts(made, base, max_lora_rank))
        if any(item.rule.mend != "option" for item in fixed.findings if item.rule):
            return replace(report, note=f"nothing was written: mended, {fixed}")
        os.rename(made, output)
    return replace(report, fixed=fixed, note=f"written: {output}: {fixed}")


def _judge(server: Server, facts: Facts) -> AdapterReport:
    items = (item._replace(rule=server.rule_of(item, facts)) for item in facts.items)
    return AdapterReport(server, tuple(items))
