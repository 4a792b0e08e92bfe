"""Read, compare and print the outcomes of tests that the plugin wrote."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

NOT_RUN = "not run"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one test, its reason if it didn't pass, and counts of calls of LoRA layers."""

    test: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return self.test.partition("::")[0].rpartition("/")[2]


@dataclass(frozen=True)
class Difference:
    """A test with different outcomes without and with fastlora."""

    test: str
    unpatched: str
    optimized: str
    reason: str

    def __str__(self) -> str:
        return f"{self.test}\n    {self.unpatched} -> {self.optimized}: {self.reason}"


def read(path: Path) -> dict[str, Outcome]:
    """The outcomes in a file, by test.  A test that failed twice (torn down too) counts once."""
    outcomes: dict[str, Outcome] = {}
    for line in path.read_text().splitlines():
        outcome = Outcome(**json.loads(line))
        if outcome.test not in outcomes or outcome.outcome == "failed":
            outcomes[outcome.test] = outcome
    return outcomes


def differences(unpatched: dict[str, Outcome], optimized: dict[str, Outcome]) -> list[Difference]:
    """Every test whose outcomes differ, also a test that only one run has."""
    found = []
    for test in unpatched | optimized:
        before = unpatched.get(test, Outcome(test, NOT_RUN))
        after = optimized.get(test, Outcome(test, NOT_RUN))
        if before.outcome != after.outcome:
            reason = after.reason or before.reason
            found.append(Difference(test, before.outcome, after.outcome, reason))
    return found


def tally(outcomes: Iterable[Outcome]) -> str:
    """Passed / failed / skipped; an expected failure counts as skipped."""
    counts = Counter(outcome.outcome for outcome in outcomes)
    skipped = counts["skipped"] + counts["xfailed"]
    return f"{counts['passed']} / {counts['failed']} / {skipped}"


def calls(outcomes: Iterable[Outcome]) -> Counter:
    total: Counter = Counter()
    for outcome in outcomes:
        total.update(outcome.calls)
    return total


def table(unpatched: dict[str, Outcome], optimized: dict[str, Outcome]) -> str:
    """A line for each test file, and one for all."""
    differing = Counter(Outcome(d.test, "").file for d in differences(unpatched, optimized))
    files: dict[str, tuple[list[Outcome], list[Outcome]]] = defaultdict(lambda: ([], []))
    for side, outcomes in enumerate((unpatched, optimized)):
        for outcome in outcomes.values():
            files[outcome.file][side].append(outcome)
    rows = [("passed / failed / skipped", "unpatched", "optimized", "differ", "fast calls", "of")]
    for file, (before, after) in files.items():
        rows.append(row(file, before, after, differing[file]))
    total = row("all", unpatched.values(), optimized.values(), differing.total())
    return "\n".join(aligned([*rows, total]))


def row(name: str, before: Iterable, after: Iterable, differing: int) -> tuple[str, ...]:
    counted = calls(after)
    numbers = (str(differing), str(counted["fast"]), str(counted.total()))
    return (name, tally(before), tally(after), *numbers)


def own_calls(optimized: dict[str, Outcome]) -> str:
    """The calls of linear layers that ran PEFT's forward, by number; packed layers by class."""
    counted = calls(optimized.values())
    names = [(n, name.partition(": ")) for name, n in counted.most_common()]
    rows = [
        (str(n), state if kind == "Linear" else f"{kind}: {state}")
        for n, (kind, _, state) in names
        if "Linear" in kind
    ]
    return "\n".join(f"{n:>8}  {state}" for n, state in rows)


def failed_in_both(unpatched: dict[str, Outcome], optimized: dict[str, Outcome]) -> str:
    """The reasons of tests that also failed without fastlora, with the number of each."""
    reasons = Counter(
        outcome.reason
        for test, outcome in unpatched.items()
        if outcome.outcome == "failed" == optimized.get(test, outcome).outcome
    )
    return "\n".join(f"{n:>8}  {reason[:120]}" for reason, n in reasons.most_common())


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in rows
    ]
