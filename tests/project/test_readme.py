"""README and docs/ tell the truth: their tables, code blocks, links, paths and make targets.

``python tests/project/test_readme.py`` writes all tables again.  A table is what its command
prints:

    <!-- benchmarks/report.py FILE -->

    | … |

So a new results file needs a new name in the comment, and nothing else.
"""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"<!-- ((?:benchmarks|examples)/\w+\.py[^\n]*?) -->\n\n(.*?)\n(?=\n|\Z)", re.S)
TABLES = [(page, *found) for page in PAGES for found in TABLE.findall(page.read_text())]
# Fenced code is no prose: its links and its lines are not read.
PROSE = {page: re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M) for page in PAGES}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def printed_by(command: str) -> str:
    result = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return result.stdout.strip()


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.mark.parametrize(
    ("page", "command", "table"),
    TABLES,
    ids=[f"{name_of(page)}: {command}" for page, command, _ in TABLES],
)
def test_a_table_is_what_its_command_prints(page, command, table):
    assert printed_by(command) == table


def test_there_are_tables():
    pages = [page.name for page, _, _ in TABLES]
    assert pages.count("README.md") == 1
    assert {"results.md", "kernels.md", "blocks.md", "quantised.md", "sweep.md"} <= set(pages)


def test_they_are_short():
    """The README's first screen has its picture; README and docs/ keep to their budgets."""
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1000
    assert re.findall(r"^!\[.*\]\((.*)\)$", text, re.M) == ["docs/demo.png"]
    docs = [page.read_text() for page in PAGES if page.parent.name == "docs"]
    assert sum(len(page.split()) for page in docs) <= 17000


def test_the_line_of_result_is_in_the_table():
    table = next(table for page, _, table in TABLES if page == README)
    ratios = re.findall(r"\*\*([\d.]+)\s+times\*\*", PROSE[README])
    assert len(ratios) >= 2
    assert set(ratios) <= set(re.findall(r"\d+\.\d+", table))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", PROSE[file], re.M)
            anchors = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, target


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_files_that_it_names_exist(page):
    """`fastlora/ops/` or `kernels/project.py`; NAME stands for what a reader chooses."""
    for path in re.findall(r"`((?:[\w.-]+/)+(?:[\w-]+\.\w+)?)`", PROSE[page]):
        assert "NAME" in path or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_has_the_targets_that_it_names(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"\bmake ([a-z-]+)", "\n".join(code_of(page)))) <= set(targets)


def code_of(page: Path) -> list[str]:
    """What stands in backticks or in a fence."""
    text = page.read_text()
    return re.findall(r"`([^`\n]+)`", text) + re.findall(r"^```\n(.*?)^```", text, re.S | re.M)


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


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What a reader has at hand: a model, a batch, and the tensors of three layers."""
    peft = pytest.importorskip("peft", reason="the README's first lines use it")
    from models import tiny_llama
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)  # they save an adapter
    r, size = 4, 8
    layers = [(torch.randn(n, size), torch.randn(r, size), torch.randn(n, r)) for n in (8, 6, 6)]
    weight, lora_a, lora_b = layers[0]
    ids = torch.randint(0, 100, (2, 6))
    every_linear = peft.LoraConfig(target_modules="all-linear")
    return {
        "model": tiny_llama(),
        "peft_model": peft.get_peft_model(tiny_llama(), every_linear),
        "batch": {"input_ids": ids, "labels": ids},
        "linear": torch.nn.Linear(size, 6),
        "arguments": TrainingArguments("run", max_steps=1, use_cpu=True, report_to="none"),
        "rows": [{"input_ids": ids[0], "labels": ids[0]}],
        "x": torch.randn(3, size),
        **{"weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": torch.randn(8)},
        "layers": layers,
    }


NAMES = ("model", "blocks", "adapters", "sweep")
WITH_CODE = (README, *(ROOT / f"docs/{name}.md" for name in NAMES))
BLOCKS = [(page, i) for page in WITH_CODE for i in range(9)]
BLOCKS = [(page, i) for page, i in BLOCKS if i < len(python_blocks(page))]


@pytest.mark.parametrize(("page", "i"), BLOCKS, ids=[f"{p.name}-{i}" for p, i in BLOCKS])
def test_a_code_block_runs_and_prints_what_it_says(page, i, names):
    import fastlora

    code = python_blocks(page)[i]
    if "export_gguf" in code:
        pytest.importorskip("gguf", reason="a block of code uses it")
    goes_on = "merge_lora" in code or "AdapterTrainer" in code
    if goes_on and "apply_lora" not in code:  # from an earlier block
        fastlora.apply_lora(names["model"], fastlora.LoRAConfig(target_modules="all-linear"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"{page.name}, block {i}", "exec"), {"fastlora": fastlora} | names)
    for promised in re.findall(r"\d+ of \d+ layers fast \(backend torch\)", code):
        assert promised in printed.getvalue()


def write_tables() -> None:
    for page in PAGES:
        text = page.read_text()
        new = TABLE.sub(lambda found: f"<!-- {found[1]} -->\n\n{printed_by(found[1])}\n", text)
        if new != text:
            page.write_text(new)
            print(f"{name_of(page)}: written")


if __name__ == "__main__":
    write_tables()
