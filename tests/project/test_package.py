"""The package: its installed files, the cost of an import, and which file may import which."""

import ast
import importlib
import json
import re
import sys
import tarfile
import zipfile
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from matrix.clone import copy_of_clone
from process import run_python

import fastlora
from fastlora.version import __version__

ROOT = Path(__file__).parents[2]

# A file imports from its own layer and lower ones, and no files import each other in a circle.
CORE = (
    {"kernels"},
    {"version", "common", "call", "formats", "reference"},
    {"backends"},
    {"ops"},
    {"layers"},
    {"packing", "peft"},
)
LAUNCH = {"integrations", "trainer"}
TOOLS = {"adapters", "doctor", "estimates", "sweeps", "tuning", "__main__"}
FLOORS = (*CORE, LAUNCH | TOOLS, {"public", "__init__"})
LONGEST_CHAIN = 18  # the number of files in the longest chain of imports


def imports(path: Path) -> list[ast.ImportFrom | ast.Import]:
    """All import statements of a file, at any depth."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def outside_modules(path: Path) -> list[str]:
    """The absolute names of the modules that a file imports."""
    names = []
    for node in imports(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif not node.level:
            names.append(str(node.module))
    return names


def imported_parts(path: Path) -> set[str]:
    """The top-level parts of fastlora that a file imports."""
    names = outside_modules(path)
    assert "fastlora" not in names
    parts = {name.split(".")[1] for name in names if name.startswith("fastlora.")}
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in imports(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: -node.level], *(node.module or "").split("."))
            parts |= {base[1]} if len(base) > 1 and base[1] else {a.name for a in node.names}
    return parts


FILES = sorted((ROOT / "fastlora").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def floor_of(part: str) -> int:
    found = [number for number, parts in enumerate(FLOORS) if part in parts]
    assert found, f"{part} is in no layer of FLOORS"
    return found[0]


def imported_files(path: Path) -> set[Path]:
    """The files of its own package that are imported when a file is imported."""
    found = set()
    tree = ast.parse(path.read_text())
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.Try))]
    for node in [node for body in bodies for node in body if isinstance(node, ast.ImportFrom)]:
        if node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in [alias.name for alias in node.names]:
                tried = (folder / f"{name}.py", folder.with_suffix(".py"), folder / "__init__.py")
                found |= set([place for place in tried if place.exists()][:1])
    return found - {path, ROOT / "fastlora" / "__init__.py"}  # that import exists for the kernels


def test_no_circle_and_no_long_chain_of_imports():
    benchmarks = (ROOT / "benchmarks").glob("*.py")
    imported = {path: imported_files(path) for path in (*FILES, *KERNELS, *benchmarks)}
    depth: dict[Path, int] = {}
    for path in TopologicalSorter(imported).static_order():  # a circle raises CycleError
        depth[path] = 1 + max((depth[other] for other in imported.get(path, ())), default=0)
    assert max(depth[path] for path in (*FILES, *KERNELS)) <= LONGEST_CHAIN


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_each_other(path):
    modules = outside_modules(path)
    outside = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "triton"}
    assert not any(name.startswith("torch.nn") for name in modules)
    assert all(node.level <= 1 for node in imports(path) if isinstance(node, ast.ImportFrom))


def test_no_launcher_hides_the_module_of_its_name():
    importlib.import_module("fastlora.kernels.launchers")
    package = importlib.import_module("fastlora.kernels")
    names = [path.stem for path in KERNELS if path.stem != "__init__"]
    found = {name: getattr(package, name, None) for name in names}
    assert [name for name, value in found.items() if callable(value)] == []
    assert callable(found["project"].project)


def test_one_file_imports_the_kernels():
    importers = [path for path in FILES if "kernels" in imported_parts(path)]
    assert importers == [ROOT / "fastlora" / "backends" / "triton" / "supported.py"]


def test_few_modules_lie_beside_the_folders():
    loose = {path.stem for path in (ROOT / "fastlora").glob("*.py")} - {"__init__", "__main__"}
    assert loose == {"public", "reference", "trainer", "version"}


def test_no_module_has_a_public_function_s_name_and_no_three_files_share_one():
    names = [path.stem for path in (*FILES, *KERNELS) if not path.stem.startswith("__")]
    folders = {path.name for path in (ROOT / "fastlora").iterdir()}
    assert not {*names, *folders} & set(fastlora.__all__) - {"reference"}
    assert [name for name, count in Counter(names).items() if count > 2] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_its_layer_and_lower_ones(path):
    own = path.relative_to(ROOT / "fastlora").with_suffix("").parts[0]
    above = [p for p in imported_parts(path) if floor_of(p) > floor_of(own)]
    assert not above, f"{own} imports {above} from a higher layer"


def test_the_oracle_shares_no_code():
    assert imported_parts(ROOT / "fastlora" / "reference.py") == set()


def test_one_folder_imports_peft_one_file_transformers_and_none_bitsandbytes():
    importers = {"peft": set(), "transformers": set(), "bitsandbytes": set()}
    for path in FILES:
        for name in {name.split(".")[0] for name in outside_modules(path)} & importers.keys():
            importers[name].add(path)
    assert {path.parent.name for path in importers["peft"]} == {"peft"}
    places = {path.relative_to(ROOT / "fastlora").as_posix() for path in importers["transformers"]}
    assert places == {"trainer.py"}
    assert not importers["bitsandbytes"]


IMPORTED = """
import json, sys, torch
before = set(sys.modules)
sys.modules["triton"] = sys.modules["transformers"] = None
torch.cuda.init = torch.cuda._lazy_init = lambda: sys.exit("a device was touched")
import fastlora
found = {"new": sorted(set(sys.modules) - before)}
values = [getattr(fastlora, name) for name in fastlora.__all__]
layer = fastlora.LoRALinear(4, 3, lora_dropout=0.5)
layer(torch.randn(2, 4)).sum().backward()
found["trained"] = layer.lora_B.grad is not None
try:
    fastlora.trainer
except ImportError as error:
    found["trainer"] = str(error)
print(json.dumps(found))
"""


def test_an_import_brings_in_fastlora_alone_and_works_without_triton_and_any_device():
    """It imports no more of torch, which would cost most; kernels and PEFT's layers are lazy."""
    found = json.loads(run_python("-c", IMPORTED, FASTLORA_BACKEND="torch"))
    new = {name for name in found["new"] if name not in ("triton", "transformers")}
    assert {name.split(".")[0] for name in new} == {"fastlora"}
    assert not [name for name in new if name.startswith("fastlora.kernels")]
    late = ("layer", "mixed", "read", "records")
    assert not new & {f"fastlora.peft.{name}" for name in late}
    assert found["trained"]
    assert "pip install 'fastlora-kernels[trainer]'" in found["trainer"]


HIDDEN = """
import importlib, importlib.util, json, sys
assert importlib.util.find_spec("kernels").origin == sys.argv[1] + "/kernels/__init__.py"
from transformers.utils.import_utils import _is_package_available
found = [_is_package_available("kernels", return_version=True)]
for name in ("kernels.layer", "kernels"):
    try:
        module = importlib.import_module(name)
        found += [module.__file__, module.get_kernel()]
    except ModuleNotFoundError as error:
        found.append(error.name)
from fastlora.kernels.gemm_lowrank import gemm_lowrank
assert gemm_lowrank.__module__ == "fastlora.kernels.gemm_lowrank"
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("name", "clones"),
    [("kernels", 1), ("kernels", 2), ("", 2)],
    ids=["installed-one-clone", "installed-two-clones", "missing-two-clones"],
)
def test_a_clone_on_the_path_hands_over_to_hugging_face_s_kernels(name, clones, tmp_path):
    """Without this package, the import works as far as transformers' look at its version."""
    other, site = tmp_path / "clone", tmp_path / "site"
    (other / "kernels").mkdir(parents=True)
    for file in ("__init__.py", "lowrank.py"):
        (other / "kernels" / file).write_text((ROOT / "kernels" / file).read_text())
    (site / "kernels").mkdir(parents=True)
    (site / "kernels-0.18.2.dist-info").mkdir()
    (site / "kernels-0.18.2.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.18.2")
    for file in ("__init__.py", "layer.py"):
        (site / "kernels" / file).write_text("def get_kernel(): return __name__")
    paths = [ROOT, *[other, ROOT] * (clones == 2), *[site] * bool(name)]
    python_path = ":".join(map(str, paths))
    found = json.loads(run_python("-c", HIDDEN, ROOT, PYTHONPATH=python_path))
    if name:
        files = [str(site / "kernels" / file) for file in ("layer.py", "__init__.py")]
        names = ["kernels.layer", "kernels"]
        assert found == [[True, "0.18.2"], files[0], names[0], files[1], names[1]]
    else:
        assert found == [[False, "N/A"], "kernels.layer", "kernels"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of a clone's files, so that building leaves nothing in the checkout."""
    return copy_of_clone(tmp_path_factory.mktemp("source") / "fastlora")


@pytest.fixture(scope="module")
def built(source) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    build = ("-m", "build", "--no-isolation", "--outdir", "dist", ".")
    run_python(*build, cwd=source, FASTLORA_REPOSITORY="https://git.example/owner/name")
    return source / "dist"


def test_the_wheel_has_kernels_in_their_place_only(built):
    (wheel,) = built.glob("fastlora_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastlora/kernels/__init__.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastlora", "fastlora_kernels"}
    expected = {str(path.relative_to(ROOT)) for path in FILES}
    expected |= {f"fastlora/kernels/{path.name}" for path in KERNELS}
    expected |= {"fastlora/py.typed"}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "fastlora").rglob("*.json")}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_pypi_s_page_has_addresses_for_links(built):
    """README's links lead to files, and PyPI doesn't have those."""
    file = zipfile.ZipFile(next(built.glob("*.whl")))
    (name,) = [name for name in file.namelist() if name.endswith("/METADATA")]
    head, page = file.read(name).decode().split("\n\n", 1)
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert all(link.startswith(("https://", "#")) for link in links)
    of_tag = f"https://git.example/owner/name/{{}}/v{__version__}/"
    assert of_tag.format("raw") + "docs/demo.png" in links
    assert of_tag.format("blob") + "docs/peft.md" in links
    assert f"Project-URL: Changes, {of_tag.format('blob')}CHANGELOG.md" in head


def test_the_sdist_builds_itself(built):
    (sdist,) = built.glob("fastlora_kernels-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "kernels/__init__.py"} <= names
    assert {"CHANGELOG.md", "tests/conftest.py", "tests/support/models.py"} <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    ours = {"fastlora", "kernels", "tests", "benchmarks", "tools"}
    assert folders == ours | {"fastlora_kernels.egg-info"}
    assert not [name for name in names if name.startswith("tests/project")]
    assert {"tools/compile_report/cases.py", "benchmarks/forms.py"} <= names
