"""Lines of code and hard sentences, with the limits of [tool.fastlora.budget] in pyproject.toml.

    python tools/budget.py            # lines of code and hard sentences, with their limits
    python tools/budget.py FILE …     # the hard sentences of these files

A line of code is not blank, not a comment, and not part of a docstring.  A sentence is hard, which
means that a reader has to read it twice, if it matches one of HABITS.  Comments, docstrings, errors
and Markdown are counted.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
HABITS = (
    r"^(Of|What|Who|Whom|Whose|Nobody|Nobody's|Else|Beside)\b(?!.*\?$)",
    r"(?i)\b(of whom|of which|in which|by which|those (that|of|which)|that of)\b",
    r"(?i)\bwhat (is|are|it|they|was|a|an|the|others?) ",
    r", since |, for (it|they|there|that|these|those|the|a|an|no|each|all|torch)\b",
    r"^For (it|they|there)\b",
    r"(?i)\bas (it|they|that|those|these|others?|layers)( own)? (is|are|does|do|was|has|have)\b",
    r"(?i)\b(nobody|somebody|whoever|anybody|whom|everybody)('s)?\b",
    r"(?i)\b(doors?|wings?|rooms?|floors?|a life|neighbou?rs?|another matter)\b",
    r", too[.,;:]|\balone\b(?! in)",
)
_SKIPPED = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def files_of(folders: str, ending: str = ".py", without: tuple[str, ...] = ()) -> list[Path]:
    """The tracked files of these folders, separated by blanks; "." is the whole repository."""
    command = ["git", "ls-files", *folders.split()]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in names.splitlines() if name.endswith(ending)]
    return [p for p in paths if p.exists() and {*without}.isdisjoint(p.relative_to(ROOT).parts)]


def lines_of_code(path: Path) -> int:
    source, lines = path.read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _SKIPPED:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            lines -= {*range(first.lineno, (first.end_lineno or first.lineno) + 1)}
    return len(lines)


def sentences_of(path: Path) -> Iterator[str]:
    texts = _markdown(path.read_text()) if path.suffix == ".md" else _texts(path.read_text())
    for text in texts:
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "X", text))
        for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", text):
            flat = " ".join(line.strip() for line in paragraph.splitlines())
            for sentence in re.split(r"(?<=[.:;!?])\s+(?=[A-Z`*(])", flat):
                sentence = sentence.strip(" *#>-|")
                if len(sentence.split()) >= 3:
                    yield sentence


@cache  # "." has the files of the other folders
def hard(path: Path) -> tuple[int, list[str]]:
    """The number of a file's sentences, and the hard sentences among them."""
    found = [*sentences_of(path)]
    return len(found), [s for s in found if any(re.search(habit, s) for habit in HABITS)]


def _markdown(text: str) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines = [line for line in text.splitlines() if not line.startswith("<!--")]
    cells = [
        f"\n{line.strip('|')}\n".replace("|", "\n\n") if line[:1] == "|" else line for line in lines
    ]
    yield "\n".join(cells)


def _texts(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Raise) and node.exc is not None:
            parts = (part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant))
            yield from (part for part in parts if isinstance(part, str))
    comments, last = [""], -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(
            r"#\s*(noqa|type:|fmt:|!)", token.string
        ):
            comments += [""] if token.start[0] != last + 1 else []
            comments[-1] += token.string.lstrip("# ") + "\n"
            last = token.start[0]
    yield from comments


def budget() -> dict[str, dict]:
    """[tool.fastlora.budget]: limits by kind and by folders."""
    text = (ROOT / "pyproject.toml").read_text()  # tomllib came with Python 3.11
    tables = re.findall(r'^\[tool\.fastlora\.budget\.(\w+)\]\n((?:".*\n)+)', text, re.M)
    rows = {name: re.findall(r'^"(.+)" = (\d+)', body, re.M) for name, body in tables}
    return {name: {folders: int(most) for folders, most in found} for name, found in rows.items()}


def measured(kind: str, folders: str) -> int:
    if kind == "lines":  # without the emulator of GPUs, the proofs, and suites of other projects
        return sum(map(lines_of_code, files_of(folders, without=("machine", "prove", "suites"))))
    counts = [hard(path) for path in files_of(folders) + files_of(folders, ".md")]
    return round(1000 * sum(len(s) for _, s in counts) / max(1, sum(n for n, _ in counts)))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, *hard(Path(name))[1], sep="\n    ")
    if not sys.argv[1:]:
        for kind, limits in budget().items():
            for folders, most in limits.items():
                print(f"{kind:9} {folders:20} {measured(kind, folders):6} of {most}")
