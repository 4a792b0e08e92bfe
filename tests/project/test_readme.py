"""README and docs/ tell the truth: their tables, links, paths, make targets, and their sizes."""

import re

import pytest
from pages import (
    CONTRIBUTING,
    DOCS,
    PAGES,
    PROSE,
    README,
    ROOT,
    TABLE,
    code_of,
    name_of,
    printed_by,
    sentences,
)

TABLES = [(page, *found) for page in PAGES for found in TABLE.findall(page.read_text())]

SENTENCES = [*sentences()]


@pytest.mark.parametrize(
    ("page", "command", "table"),
    TABLES,
    ids=[f"{name_of(page)}: {command}" for page, command, _ in TABLES],
)
def test_a_table_is_what_its_command_prints(page, command, table):
    assert printed_by(command) == table


def test_there_are_tables():
    pages = [page.name for page, _, _ in TABLES]
    assert [page for page, _, _ in TABLES].count(README) == 1
    expected = {"results.md", "blocks.md", "experts.md", "quantised.md", "rank.md"}
    assert expected <= set(pages)


def test_they_are_short():
    """The README's first screen has its picture; README and docs/ keep to their budgets."""
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1000
    badge, picture = re.findall(r"^!\[.*\]\((.*)\)$", text.partition("\n## ")[0], re.M)
    assert (ROOT / ".github" / badge.removeprefix("../../actions/")).parent.exists()
    assert picture == "docs/demo.png"
    assert sum(len(page.read_text().split()) for page in DOCS) <= 17500


@pytest.mark.parametrize(
    ("page", "pattern", "numbers"),
    SENTENCES,
    ids=[f"{page}: {', '.join(numbers)}" for page, _, numbers in SENTENCES],
)
def test_a_sentence_repeats_the_numbers_of_a_results_file(page, pattern, numbers):
    [found] = re.finditer(pattern, (ROOT / page).read_text(), re.S)
    assert found.groups() == numbers


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]):
        # Its own pages are on GitHub alone.
        if target.startswith(("http", "../../issues", "../../../issues", "../../actions")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            text = PROSE[file] if file in PROSE else file.read_text()
            heads = re.findall(r"^#+ (.*)$", text, re.M)
            anchors = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, target


def test_pages_that_the_code_names_exist():
    """An error or a docstring sends people to docs/."""
    folders = ("fastlora", "kernels", "benchmarks", "tools", "examples")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    named = {name for file in files for name in re.findall(r"docs/\w+\.\w+", file.read_text())}
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=name_of)
def test_files_that_it_names_exist(page):
    """`fastlora/ops/` or `kernels/project.py`; NAME stands for what a reader chooses."""
    for path in re.findall(r"`((?:[\w.-]+/)+(?:[\w-]+\.\w+)?)`", PROSE[page]):
        assert "NAME" in path or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_has_the_targets_that_it_names(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"\bmake ([a-z-]+)", "\n".join(code_of(page)))) <= set(targets)


def test_the_design_has_the_floors():
    """docs/design.md's table names what test_package.py's FLOORS hold."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", PROSE[ROOT / "docs/design.md"], re.M)
    named = {(int(n), w) for n, row in rows for w in re.findall(r"`(\w+)(?:/|\.py)`", row)}
    code = (ROOT / "tests/project/test_package.py").read_text()
    scope: dict = {}
    exec(re.search(r"^FLOORS = \(.*?^\)", code, re.M | re.S)[0], scope)
    held = {(n, part) for n, parts in enumerate(scope["FLOORS"]) for part in parts}
    assert {(n, part) for n, part in held if part not in ("version", "__init__", "table")} == named


def test_one_version_of_ruff():
    files = [ROOT / "pyproject.toml", ROOT / ".pre-commit-config.yaml"]
    versions = [re.findall(r"ruff==([\d.]+)", file.read_text()) for file in files]
    assert all(versions)
    assert len({version for found in versions for version in found}) == 1
