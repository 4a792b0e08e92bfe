"""Private names of other packages: which ones fastlora reads, and that they still exist."""

import ast
import importlib
import inspect
import operator
import re
from pathlib import Path

import pytest
import torch

tomllib = pytest.importorskip("tomllib")  # in Python 3.11 and newer

ROOT = Path(__file__).parents[2]
TABLE = tomllib.loads(Path(__file__).with_name("private_names.toml").read_text())
NAMES = [(place, name) for place, names in TABLE.items() for name in names]
TREES = [
    ast.parse(path.read_text())
    for folder in ("fastlora", "kernels")
    for path in (ROOT / folder).rglob("*.py")
]
NODES = [node for tree in TREES for node in ast.walk(tree)]
_READS = ("getattr", "hasattr", "setattr")
_DOCUMENTED = {"_asdict", "_replace", "_exit", "_getframe"}  # Python's


def private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch("_[a-zA-Z]+[a-zA-Z0-9_]*", name) is not None


def own_names() -> set[str]:
    """The names that fastlora itself defines or assigns."""
    found = set(_DOCUMENTED)
    for node in NODES:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
        elif isinstance(node, ast.Dict):  # members of a class that is made at run time
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return found


def names_read() -> set[str]:
    """The private attributes, imports, and names of getattr and hasattr in all files."""
    found = set()
    for node in NODES:
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in _READS:
            found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return {name for name in found if private(name)}


def test_every_private_name_is_in_the_table():
    missing = names_read() - own_names() - {name for _, name in NAMES}
    assert not missing, f"say in private_names.toml what these are for: {sorted(missing)}"


@pytest.mark.parametrize(("place", "name"), NAMES, ids=lambda text: text)
def test_a_private_name_still_exists(place, name):
    try:
        owner = importlib.import_module(place)
    except ImportError:
        if not place.startswith("torch."):
            pytest.skip(f"needs {place}")
        owner = operator.attrgetter(place.removeprefix("torch."))(torch)
    if "cuda" in name and not torch.backends.cuda.is_built():
        pytest.skip("needs PyTorch's build for CUDA")
    # An instance's attribute is no attribute of the module, but its name is in the module's text.
    text = "" if hasattr(owner, name) else inspect.getsource(owner)
    assert hasattr(owner, name) or re.search(rf"\b{name}\b", text), f"{place} lost {name}"
