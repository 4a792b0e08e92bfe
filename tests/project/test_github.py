"""GitHub's files: forms name things that exist, and the citation has this version."""

import re
from pathlib import Path

import pytest

import fastlora
from fastlora.__main__ import main

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"


def read(path: Path) -> dict:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    return yaml.safe_load(path.read_text())


def test_commands_and_names_in_the_forms_exist(capsys):
    texts = "\n".join(path.read_text() for path in GITHUB.rglob("*TEMPLATE*/*.yml"))
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"python -m fastlora (\w+)", texts)
    assert set(commands) == {"doctor"}
    assert "doctor" in capsys.readouterr().out
    names = set(re.findall(r"fastlora\.(\w+)", texts))
    assert {"check", "coverage", "optimize"} <= names <= set(fastlora.__all__)
    for file in re.findall(r"python ((?:\w+/)+\w+\.py)", texts):
        assert (ROOT / file).exists()
    sources = "\n".join(path.read_text() for path in (ROOT / "fastlora").rglob("*.py"))
    for variable in set(re.findall(r"FASTLORA_\w+", texts)):
        assert f'"{variable}"' in sources


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
