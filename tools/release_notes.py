"""Print the changelog's section of a tag of this version: ``release_notes.py v0.2.0``."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(tag: str) -> str:
    found = re.search('__version__ = "(.+)"', (ROOT / "fastlora/version.py").read_text())
    version = found[1]
    if tag != f"v{version}":
        raise SystemExit(
            f"the tag is {tag}, but fastlora/version.py says {version}: tag v{version}"
        )
    text = (ROOT / "CHANGELOG.md").read_text()
    heading = rf"^## {re.escape(version)} – \d{{4}}-\d\d-\d\d\n"
    section = re.search(rf"{heading}(.*?)(?=^## |\Z)", text, re.M | re.S)
    if not section or not section[1].strip():
        raise SystemExit(f"CHANGELOG.md has no section `## {version} – YEAR-MONTH-DAY`: write it")
    return section[1].strip()


if __name__ == "__main__":
    print(notes(sys.argv[1]))
