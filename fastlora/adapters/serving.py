"""Say what a server does with each part of an adapter, and mend it: ``fastlora.check_adapter``."""

import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..layers.modules import some
from ..model.files import check_folder, write_adapter
from .servers.facts import PAIRED, Item, read_facts
from .servers.mend import mended
from .servers.rules import Rule, Server, read_server


class Finding(NamedTuple):
    """A tensor or a setting, and the server's rule for it; None if the server loads it."""

    item: Item
    rule: Rule | None


@dataclass(frozen=True)
class AdapterReport:
    """A finding for each tensor and setting.  Prints a line for each rule that applies.

    With ``fix``: ``output`` is the written folder, and ``fixed`` the report on it; or ``why_not``
    says why nothing was written.
    """

    server: Server
    findings: tuple[Finding, ...]
    output: Path | None = None
    fixed: "AdapterReport | None" = None
    why_not: str = ""

    @property
    def loads(self) -> bool:
        """Whether the server loads the whole adapter."""
        return all(finding.rule is None for finding in self.findings)

    def __str__(self) -> str:
        name = f"{self.server.name} {self.server.version}"
        verb = "loads" if self.loads else "doesn't load"
        lines = [f"{name} {verb} the whole adapter"]
        rules = dict.fromkeys(finding.rule for finding in self.findings)
        for rule in sorted(rules, key=lambda rule: rule is None):
            names = _names([item for item, own in self.findings if own is rule])
            fix = " (--fix does it)" if rule and rule.mend == "fix" else ""
            text = rule and f"{names}: {rule.says} [{rule.source}]. {rule.todo}{fix}."
            lines.append(f"  {rule.verdict if rule else 'loads'}: {text or names}")
        lines += [f"nothing was written: {self.why_not}"] if self.why_not else []
        return "\n".join(lines + ([f"written: {self.output}: {self.fixed}"] if self.fixed else []))


def _names(items: list[Item]) -> str:
    """The names of tensors, with * for numbers, and their count; or of settings."""
    tensors = [item for item in items if item.key] or items
    names = (
        item.name if item.kind in PAIRED.split() else item.key or item.name for item in tensors
    )
    count = f" ({len(tensors)} tensors)" if len(tensors) > 1 and tensors[0].key else ""
    return some([*dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names)]) + count


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

    ``fix``: a new folder for an adapter that computes the same and that the server loads whole.
    Its ranks and scales are uniform.  Nothing is written if a finding can't be mended in the files,
    except for options of the server.  The input never changes.

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
    if left := [item for item, rule in report.findings if rule and not rule.mend]:
        return replace(report, why_not=f"--fix can't mend {_names(left)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fastlora-", dir=output.parent) as scratch:
        made = Path(scratch) / "adapter"
        write_adapter(made, *mended(facts, rules))
        fixed = _judge(rules, read_facts(made, base, max_lora_rank))
        if left := [item for item, rule in fixed.findings if rule and rule.mend != "option"]:
            return replace(report, why_not=f"mended, it still has {_names(left)}: {fixed}")
        os.rename(made, output)
    return replace(report, output=output, fixed=fixed)


def _judge(server: Server, facts: Any) -> AdapterReport:
    return AdapterReport(server, tuple(Finding(i, server.rule_of(i, facts)) for i in facts.items))
