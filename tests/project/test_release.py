"""A release: its notes, tag and citation; and a module with this package's name."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fastlora import public
from fastlora.version import __version__

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()


def notes(tag: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.release_notes", tag]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_notes_of_a_tag_are_the_changelog_s_section():
    found = notes(f"v{__version__}")
    assert found.returncode == 0
    assert found.stdout.strip() in (ROOT / "CHANGELOG.md").read_text()
    assert re.findall("^## ", found.stdout, re.M) == []
    assert len(re.findall(r"^\* ", found.stdout, re.M)) > 10


def test_a_tag_of_another_version_is_refused():
    found = notes("v9.9.9")
    assert found.returncode == 1
    assert f"tag v{__version__}" in found.stderr


def test_a_console_script_is_the_command(capsys):
    [name, module, function] = re.search(
        r'^\[project\.scripts\]\n(\w+) = "([\w.]+):(\w+)"$', PROJECT, re.M
    ).groups()
    assert name == "fastlora"
    with pytest.raises(SystemExit) as stop:
        getattr(import_module(module), function)(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"fastlora-kernels {__version__}\n")


def test_names_in_the_forms_exist():
    forms = (ROOT / ".github").rglob("*TEMPLATE*/*.yml")
    texts = "\n".join(path.read_text() for path in forms)
    assert set(re.findall(r"python -m fastlora (\w+)", texts)) == {"doctor"}
    names = set(re.findall(r"fastlora\.(\w+)", texts))
    assert {"check", "coverage", "optimize"} <= names <= set(public.__all__)


def test_the_citation_is_of_this_version():
    """Its date equals the date in CHANGELOG.md's heading, if the heading has one."""
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}
    known = required | {"abstract", "type", "license", "version", "date-released", "keywords"}
    assert required <= citation.keys() <= known
    assert citation["version"] == __version__
    text, number = (ROOT / "CHANGELOG.md").read_text(), re.escape(__version__)
    heading = re.search(rf"^## \[?{number}\]?(?:\W+(\d{{4}}-\d\d-\d\d))?$", text, re.M)
    assert heading
    assert citation.get("date-released") == heading[1]
    assert f'license = "{citation["license"]}"' in PROJECT
    assert all(f'"{word}"' in PROJECT for word in citation["keywords"])
