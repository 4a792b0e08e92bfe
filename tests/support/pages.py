"""README, CONTRIBUTING and docs/: their text, their code, their tables, the numbers of the demos.

``python tests/support/pages.py`` writes all tables again, and the sentences that repeat a demo's
numbers (``sentences``).  A table is what its command prints:

    <!-- benchmarks/report.py FILE -->

    | … |

So a new results file needs a new name in the comment, and nothing else.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, CONTRIBUTING, ROOT / "benchmarks/README.md", *DOCS]
TABLE = re.compile(
    r"<!-- ((?:benchmarks|examples|tools/\w+)/\w+\.py[^\n]*?) -->\n\n(.*?)\n(?=\n|\Z)", re.S
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
# Fenced code is no prose: its links and its lines are not read.
PROSE = {page: _FENCE.sub("", page.read_text()) for page in PAGES}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language; "" is for those of none."""
    return [code for name, code in _FENCE.findall(page.read_text()) if name == language]


def code_of(page: Path) -> list[str]:
    """What stands in backticks or in a fence of no language."""
    return re.findall(r"`([^`\n]+)`", PROSE[page]) + blocks_of(page)


def printed_by(command: str) -> str:
    result = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return result.stdout.strip()


def report_of(page: str, kind: str) -> dict:
    """The results file of a kind that a page names."""
    [name] = set(re.findall(rf"results/[\w-]+/{kind}-[\d-]+\.json", (ROOT / page).read_text()))
    return json.loads((ROOT / "benchmarks" / name).read_text())


def numbers_of(report: dict, side: str, base: str = "peft") -> tuple[str, str]:
    """The time of a side's step over another's, and what its memory grows by over PEFT's."""
    growth = [report["results"][name]["peak_memory_growth"] for name in (side, "PEFT")]
    return f"{report[f'step_time_over_{base}'][side]['median']:.3f}", f"{growth[0] / growth[1]:.2f}"


def sentences() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Of each: its page, a pattern with a group for each number, and the numbers."""
    demo = report_of("README.md", "demo")
    yield "README.md", r'make demo ARGS="--steps (\d+)"', (str(demo["settings"]["steps"]),)
    optimized, ours = numbers_of(demo, "optimized"), numbers_of(demo, "fastlora")
    nf4 = numbers_of(report_of("docs/quantized.md", "demo-quantized"), "fastlora")
    experts = numbers_of(report_of("docs/experts.md", "demo-experts"), "fastlora")
    yield "README.md", r"takes \*\*(\S+) times\*\* PEFT's.*?grows by \*\*(\S+) times", optimized
    frozen = [numbers_of(demo, side, "frozen")[0] for side in ("optimized", "PEFT")]
    yield (
        "README.md",
        r"takes (\S+) times the frozen model's step, PEFT's (\S+) times",
        tuple(frozen),
    )
    cells = r" \| step \*\*(\S+)\*\*, memory \*\*(\S+)\*\* \|"
    yield "README.md", "TRL" + cells, optimized
    yield "README.md", "without PEFT" + cells, ours
    yield "README.md", "packed" + cells, experts
    yield "README.md", "GGUF" + cells, nf4
    gain = r"\*\*Gain\*\*: .*?step of .*?takes \*\*(\S+)\*\* of.*?grows\s+by\s+\*\*(\S+)\*\*"
    yield "docs/peft.md", gain, optimized
    yield "docs/trainer.md", gain, optimized
    yield "docs/model.md", gain, ours
    yield "docs/quantized.md", gain, nf4
    yield "docs/experts.md", gain, experts
    yield "docs/cpu.md", r"SmolLM2 135M takes \*\*(\S+)\*\* of PEFT's", ours[:1]
    small = demo["results"]["fastlora"]["resized"]
    losses = demo["results"]["fastlora"]["held_out_loss"][-1][1], *small["losses"].values()
    pattern = (
        r"effective rank (\S+)\) has a\s+held-out\s+loss\s+of\s+(\S+); at 8, 4, 2 and 1 it\s+has"
    )
    pattern += r"\s+(\S+),\s+(\S+),\s+(\S+)\s+and\s+(\S+)\s"
    shown = f"{small['effective_rank']:.1f}", *(f"{loss:.3f}" for loss in losses)
    yield "docs/rank.md", pattern, shown
    sweep = report_of("docs/rank.md", "demo-sweep")
    best = next(trial for trial in sweep["trials"] if trial["name"] == sweep["best"])
    pattern = r"\((\S+) before training\).*?some (\d+) minutes.*?rank (\d+) at a rate of\s+(\S+),"
    first, last = best["losses"][0][1], best["losses"][-1][1]
    shown = f"{first:.3f}", f"{sweep['seconds'] / 60:.0f}", str(best["config"]["r"])
    shown += (f"{best['learning_rate']:.0e}".replace("e-0", "e-"), f"{last:.3f}")
    yield "docs/rank.md", pattern + r" ends at (\S+) \(", shown


def write() -> None:
    for page in PAGES:
        text = page.read_text()
        new = TABLE.sub(lambda found: f"<!-- {found[1]} -->\n\n{printed_by(found[1])}\n", text)
        write_if_new(page, text, new)
    for name, pattern, numbers in sentences():
        text = new = (ROOT / name).read_text()
        found = re.search(pattern, text, re.S)
        for group, number in reversed([*enumerate(numbers, 1)]):  # from the end: places stay
            new = new[: found.start(group)] + number + new[found.end(group) :]
        write_if_new(ROOT / name, text, new)


def write_if_new(page: Path, text: str, new: str) -> None:
    if new != text:
        page.write_text(new)
        print(f"{name_of(page)}: written")


if __name__ == "__main__":
    write()
