"""README, CONTRIBUTING and docs/: their text, their code, their tables.

``python tests/support/pages.py`` writes all tables again.  A table is what its command prints:

    <!-- benchmarks/report.py FILE -->

    | … |

So a new results file needs a new name in the comment, and nothing else.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, CONTRIBUTING, ROOT / "benchmarks/README.md", *DOCS]
TABLE = re.compile(
    r"<!-- ((?:benchmarks|examples|tools/matrix)/\w+\.py[^\n]*?) -->\n\n(.*?)\n(?=\n|\Z)", re.S
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


def write_tables() -> None:
    for page in PAGES:
        text = page.read_text()
        new = TABLE.sub(lambda found: f"<!-- {found[1]} -->\n\n{printed_by(found[1])}\n", text)
        if new != text:
            page.write_text(new)
            print(f"{name_of(page)}: written")


if __name__ == "__main__":
    write_tables()
