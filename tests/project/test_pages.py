"""README and docs/: every code block runs, every command exists, and every number is up to date.

Tables equal the output of their commands; links, paths and make targets exist.
"""

import contextlib
import inspect
import io
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from models import tiny_llama
from moe_models import base_model
from pages import (
    CONTRIBUTING,
    DOCS,
    PAGES,
    PROSE,
    README,
    ROOT,
    TABLE,
    blocks_of,
    code_of,
    name_of,
    printed_by,
    save_tiny_model,
    sentences,
    tiny_tokenizer,
)

import fastlora
from fastlora.__main__ import main

# Users' pages begin alike: the audience, the code, its gain, its cost.
USERS = ("peft", "trainer", "experts", "quantized", "adapters", "rank", "cpu", "gpu")
NOT_RUN = "# Not run by the tests: "  # followed by the reason, as the first line of a block
PROMISED = re.compile(
    r"\d+ of \d+ (?:layers fast \(backend torch\)|gated MLPs as one block)|\d+ quantized: NF4"
)
WITH_CODE = [page for page in PAGES if blocks_of(page, "python")]
SENTENCES = [*sentences()]


def quantized_llama() -> torch.nn.Module:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = tiny_llama()
    fastlora.pack(model, "nf4", modules=r"model\.layers.*_proj")
    return model


def mixture() -> torch.nn.Module:
    return base_model("qwen3", moe_intermediate_size=32)  # a block of MXFP4


@pytest.fixture
def as_on_the_hub(tmp_path, monkeypatch) -> None:
    """The working directory gets a tiny model under the name of the model on the Hub."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path)


MODELS = {"experts.md": mixture, "quantized.md": quantized_llama}


def names_for(page: Path) -> dict:
    """The names a reader has: a model, a batch, and the tensors of three layers."""
    peft = pytest.importorskip("peft", reason="needs peft")
    from transformers import TrainingArguments

    load_model = MODELS.get(page.name, tiny_llama)
    r, size = 4, 8
    layers = [(torch.randn(n, size), torch.randn(r, size), torch.randn(n, r)) for n in (8, 6, 6)]
    weight, lora_a, lora_b = layers[0]
    ids = torch.randint(0, 100, (2, 6))
    every_linear = peft.LoraConfig(target_modules="all-linear")
    return {
        "load_model": load_model,
        "model": load_model(),
        "peft_model": peft.get_peft_model(tiny_llama(), every_linear),
        "batch": {"input_ids": ids, "labels": ids},
        "linear": torch.nn.Linear(size, 6),
        "arguments": TrainingArguments("run", max_steps=1, use_cpu=True, report_to="none"),
        "rows": [{"input_ids": ids[0], "labels": ids[0]}],
        "tokenizer": tiny_tokenizer(),
        "x": torch.randn(3, size),
        **{"weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": torch.randn(8)},
        "layers": layers,
    }


def run(code: str, name: str, names: dict) -> None:
    """Run a block; it must print the reports that it shows."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), names)
    for promised in PROMISED.findall(code):
        assert promised in printed.getvalue()


@pytest.mark.parametrize("page", [p for p in WITH_CODE if p != README], ids=name_of)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, as_on_the_hub):
    names = names_for(page)
    for i, code in enumerate(blocks_of(page, "python")):
        if not code.startswith(NOT_RUN):
            run(code, f"{page.name}, block {i}", names)


@pytest.mark.parametrize("i", range(len(blocks_of(README, "python"))))
def test_a_block_of_the_readme_runs_by_itself(i, as_on_the_hub):
    code = blocks_of(README, "python")[i]
    is_complete = "from_pretrained" in code  # a script, which needs no names of the reader
    run(code, f"README.md, block {i}", {} if is_complete else names_for(README))


def test_few_blocks_are_not_run():
    blocks = [code for page in WITH_CODE for code in blocks_of(page, "python")]
    assert len(blocks) >= 25
    assert len([code for code in blocks if code.startswith(NOT_RUN)]) <= 2


@pytest.mark.parametrize("name", USERS)
def test_a_page_of_users_begins_with_code_gain_and_cost(name):
    """Its numbers in bold come from a results file or a table."""
    page = ROOT / f"docs/{name}.md"
    head, below = page.read_text().split("\n## ", 1)
    assert len(head.splitlines()) <= 35
    assert head.index("```python") < head.index("\n* **Gain**") < head.index("\n* **Cost**")
    assert numbers_without_source(page, head, below) == []


def test_the_bold_numbers_of_the_readme_have_a_source():
    head, below = README.read_text().split("\n## Results", 1)
    assert len(re.findall(r"\*\*\d+ %\*\*", head)) >= 5
    assert numbers_without_source(README, head, below) == []


def numbers_without_source(page: Path, head: str, below: str) -> list[str]:
    """The numbers in bold that neither a results file (``sentences``) nor a table has.

    The tables are those below the head, and on the pages that the head links.
    """
    from_files = {
        number for name, _, found in SENTENCES if name == name_of(page) for number in found
    }
    linked = re.findall(r"\]\(([\w./]+\.md)", head)
    texts = [below, *((page.parent / path).read_text() for path in linked)]
    tables = "\n".join(line for text in texts for line in text.splitlines() if line[:1] == "|")
    numbers = set(re.findall(r"\*\*([\d.]+)(?: %)?\*\*", head)) - from_files
    return [number for number in numbers if not re.search(rf"\b{number}\b", tables)]


def test_the_site_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert {page.name for page in DOCS} <= set(re.findall(r"[\w.-]+\.md", nav))
    named = set(re.findall(r"docs/([\w.-]+)\.md", README.read_text()))
    assert {*USERS, "install"} <= named


def help_of(*command: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue()


def options(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", text)) - {"--help"}


COMMANDS = re.findall(r"^    (\w[\w-]*)", help_of(), re.M)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_there_with_their_options(page):
    for line in "\n".join(code_of(page)).splitlines():
        if found := re.search(r"python -m fastlora(?: ([a-z][\w-]*))?(.*)", line):
            assert found[1] in (None, *COMMANDS), line
            own = re.match("(?: --[a-z-]+)*", found[2])[0] if found[1] == "run" else found[2]
            assert options(own) <= options(help_of(*filter(None, [found[1]]))), line
        elif found := re.search(r"python (?:-m ([\w.]+)|([\w/]+\.py))([^#]*)", line):
            if (found[1] or "").split(".")[0] in ("pip", "pytest"):
                continue
            path = ROOT / (found[2] or found[1].replace(".", "/"))
            file = (
                path
                if found[2]
                else next(iter([*path.glob("__main__.py"), path.with_suffix(".py")]))
            )
            assert file.exists(), line
            missing = [o for o in options(found[3]) if f'"{o}"' not in file.read_text()]
            assert missing == [], line


REFERENCE = (ROOT / "docs/reference.md").read_text()


def test_the_reference_has_every_public_name():
    """Each with a link to the file that has its docstring."""
    named = dict(re.findall(r"^\* \[`(\S+)`\]\((\S+)\): .", REFERENCE, re.M))
    public = {f"fastlora.{name}" for name in fastlora.__all__ if name != "__version__"}
    of_trainer = {f"fastlora.trainer.{name}" for name in ("MergedSampling", "Optimize")}
    assert sorted(named) == sorted(public | of_trainer)
    for name, path in named.items():
        source = inspect.getsourcefile(pkgutil.resolve_name(name))
        assert (ROOT / "docs" / path).resolve() == Path(source), name


def test_the_reference_has_every_command_option_and_setting():
    for command in COMMANDS:
        line = re.search(rf"^python -m fastlora {command}\b.*", REFERENCE, re.M)[0]
        assert options(line) == options(help_of(command))
    files = (ROOT / "fastlora").rglob("*.py")
    read = {name for file in files for name in re.findall(r"FASTLORA_\w+", file.read_text())}
    assert set(re.findall(r"FASTLORA_\w+", REFERENCE)) == read


TABLES = [(page, *found) for page in PAGES for found in TABLE.findall(page.read_text())]


@pytest.mark.parametrize(
    ("page", "command", "table"),
    TABLES,
    ids=[f"{name_of(page)}: {command}" for page, command, _ in TABLES],
)
def test_a_table_is_its_command_s_output(page, command, table):
    assert printed_by(command) == table


def test_they_are_short():
    """README and docs/ stay within their limits of lines and words."""
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1000
    assert sum(len(page.read_text().split()) for page in [README, *DOCS]) <= 18000


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
        # The repository's own pages exist only on GitHub.
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
    """Errors and docstrings refer users to docs/."""
    folders = ("fastlora", "kernels", "benchmarks", "tools", "examples")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    named = {name for file in files for name in re.findall(r"docs/\w+\.\w+", file.read_text())}
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=name_of)
def test_files_that_it_names_exist(page):
    """For example `fastlora/ops/` or `kernels/project.py`; NAME is a placeholder."""
    for path in re.findall(r"`((?:[\w.-]+/)+(?:[\w-]+\.\w+)?)`", PROSE[page]):
        assert "NAME" in path or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_has_the_targets_that_it_names(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"\bmake ([a-z-]+)", "\n".join(code_of(page)))) <= set(targets)


def test_the_design_has_the_floors():
    """The table in docs/design.md equals the table of layers in test_package.py."""
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


def test_the_readme_has_a_complete_script():
    scripts = [code for code in blocks_of(README, "python") if "from_pretrained" in code]
    assert len(scripts) == 1
    steps = "fastlora.get_peft_model( print(fastlora.coverage( .backward() {loss.item() "
    steps += ".save_pretrained( fastlora.load_adapter( print(tokenizer.decode("
    assert [step for step in steps.split() if step not in scripts[0]] == []
