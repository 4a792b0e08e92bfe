"""GitHub's files: forms name things that exist, and the citation has this version."""

import re
from pathlib import Path

import pytest

import fastlora

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"


def read(path: Path) -> dict:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    return yaml.safe_load(path.read_text())


def test_names_in_the_forms_exist():
    texts = "\n".join(path.read_text() for path in GITHUB.rglob("*TEMPLATE*/*.yml"))
    assert set(re.findall(r"python -m fastlora (\w+)", texts)) == {"doctor"}
    names = set(re.findall(r"fastlora\.(\w+)", texts))
    assert {"check", "coverage", "optimize"} <= names <= set(fastlora.__all__)


def test_the_citation_is_of_this_version():
    """Its date equals the date in CHANGELOG.md's heading, if the heading has one."""
    citation = read(ROOT / "CITATION.cff")
    required = {"cff-version", "message", "title", "authors"}
    known = required | {"abstract", "type", "license", "version", "date-released", "keywords"}
    assert required <= citation.keys() <= known
    assert citation["version"] == fastlora.__version__
    text, number = (ROOT / "CHANGELOG.md").read_text(), re.escape(fastlora.__version__)
    heading = re.search(rf"^## \[?{number}\]?(?:\W+(\d{{4}}-\d\d-\d\d))?$", text, re.M)
    assert heading
    assert citation.get("date-released") == heading[1]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'license = "{citation["license"]}"' in project
    assert all(f'"{word}"' in project for word in citation["keywords"])
