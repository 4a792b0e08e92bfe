"""The package: what is installed, what an import costs, and which file may import which."""

import ast
import shutil
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from process import run_python

ROOT = Path(__file__).parents[2]

# Each may import from those before it, never from those behind it.
ORDER = [
    "version", "foreign", "kernels", "blocks", "formats", "projection", "segments", "mapping",
    "reference", "backends", "ops", "quant", "frozen", "base", "hooks", "activation", "experts",
    "adapted", "quantised", "layer", "expert_weight", "expert_layer", "modules", "gather",
    "classes", "beside", "report", "mlp", "batch", "model", "peft", "table", "price", "trials",
    "trainer", "doctor", "__main__", "__init__",
]  # fmt: skip
# And so inside of a folder.
ORDER_INSIDE = {
    "kernels": [
        "common", "launch", "target", "config", "segments", "sum_planes", "project", "packed",
        "gemm_config", "gemm_lowrank", "weight_grad", "dequant", "gated", "defaults", "plan",
        "script", "kept",
    ],
    "formats": [
        "format", "scales", "four_bit", "int8", "int4", "affine", "float8", "gguf", "hqq", "gptq",
    ],
    "reference": ["lora", "dora", "gated", "grouped", "multi"],
    "backends": [
        "protocol", "products", "dropout", "bases", "gated", "rows", "grouped", "multi", "torch",
        "triton",
    ],
    "triton": ["cover", "packed", "layer", "grouped", "multi", "gated"],
    "quant": ["vendor", "once", "bitsandbytes", "torchao", "float8", "gguf", "hqq", "gptq"],
    "ops": [
        "autocast", "call", "norm", "library", "grouped_library", "function", "grouped_function",
        "textbook", "kinds", "few", "functional", "grouped", "dora", "gated",
        "routing", "experts", "multi_checks", "multi_function", "multi_library", "multi",
    ],
    "model": [
        "config", "experts", "candidates", "targets", "adapter_config", "arguments", "inject",
        "merge", "embeddings", "files", "tensors", "checkpoint",
    ],
    "peft": [
        "versions", "coverage", "optimize", "dropout", "masks", "moment", "reading", "mixed",
        "layer", "bitsandbytes", "torchao", "hqq", "gptq", "experts", "mixed_model", "swap",
        "block", "records", "check",
    ],
    "trials": [
        "trial", "options", "record", "batches", "layer", "state", "plot", "progress", "training",
        "search",
    ],
    "price": ["record", "count", "measure", "quote", "load"],
    "doctor": ["dtypes", "processor", "call", "self_test", "report"],
}  # fmt: skip
# Imported inside of functions, when a model with PEFT's layers is met.
LATE = {
    "peft": {
        "coverage": {"mixed", "records"},
        "optimize": {"block", "swap"},
    }
}


def imports(path: Path) -> list[ast.ImportFrom | ast.Import]:
    """Of a file, anywhere in it."""
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
    """The parts of fastlora, by their first name, that a file imports."""
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
INSIDE = [p for p in (*KERNELS, *FILES) if p.parent.name in ORDER_INSIDE]


@pytest.mark.parametrize("path", INSIDE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_in_a_folder_a_file_imports_from_those_below(path):
    folder = path.parent.name
    order = [*ORDER_INSIDE[folder], "__init__"]
    late = LATE.get(folder, {}).get(path.stem, set())
    for node in imports(path):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            below = {*order[: order.index(path.stem)], *late}
            assert set(names) <= below, f"{folder}/{path.stem} imports {names}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_each_other(path):
    modules = outside_modules(path)
    outside = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "triton"}
    assert not any(name.startswith("torch.nn") for name in modules)
    assert all(node.level <= 1 for node in imports(path) if isinstance(node, ast.ImportFrom))


def test_the_two_wings_know_nothing_of_each_other():
    for wing, other in (("model", "peft"), ("peft", "model")):
        for path in (ROOT / "fastlora" / wing).glob("*.py"):
            assert other not in imported_parts(path), path


def test_no_module_shares_its_place_with_a_public_function():
    code = (
        "import fastlora, types; names = set(fastlora.__all__) - {'reference'}; print(*names);"
        "print(*[n for n in names if isinstance(getattr(fastlora, n), types.ModuleType)])"
    )
    names, *modules = run_python("-c", code).splitlines()
    assert not any(modules)
    assert not {path.stem for path in (ROOT / "fastlora").iterdir()} & set(names.split())


def test_one_file_imports_the_kernels():
    importers = [path for path in FILES if "kernels" in imported_parts(path)]
    assert importers == [ROOT / "fastlora" / "backends" / "triton" / "cover.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_layers_below(path):
    own = path.relative_to(ROOT / "fastlora").with_suffix("").parts[0]
    assert own in ORDER, f"{own} has no place in the order of layers"
    for part in imported_parts(path) - {own}:
        assert part in ORDER, f"{path}: fastlora.{part} has no place in the order of layers"
        assert ORDER.index(part) < ORDER.index(own), f"{own} imports {part}, which is above it"


def test_the_oracle_shares_no_code():
    for path in (ROOT / "fastlora" / "reference").rglob("*.py"):
        assert imported_parts(path) <= {"reference"}


def test_one_folder_imports_peft_two_files_transformers_and_none_bitsandbytes():
    importers = {"peft": set(), "transformers": set(), "bitsandbytes": set()}
    for path in FILES:
        for name in {name.split(".")[0] for name in outside_modules(path)} & importers.keys():
            importers[name].add(path)
    assert {path.parent.name for path in importers["peft"]} == {"peft"}
    places = {path.relative_to(ROOT / "fastlora").as_posix() for path in importers["transformers"]}
    assert places == {"trainer.py", "price/load.py"}
    assert not importers["bitsandbytes"]


def test_without_transformers_its_trainer_says_what_to_install():
    code = (
        "import sys; sys.modules['transformers'] = None; import fastlora\n"
        "try: import fastlora.trainer\n"
        "except ImportError as error: print(error)"
    )
    assert "pip install transformers accelerate" in run_python("-c", code)


def test_import_brings_in_fastlora_alone():
    """Nothing more of torch either, which would cost most; the kernels and PEFT's layers wait."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastlora;"
        "print(*set(sys.modules) - before)"
    )
    modules = set(run_python("-c", code).split())
    assert {name.split(".")[0] for name in modules} == {"fastlora"}
    assert not [name for name in modules if name.startswith("fastlora.kernels")]
    late = ("layer", "moment", "reading", "swap")
    assert not modules & {f"fastlora.peft.{name}" for name in late}


def test_works_without_triton_and_touches_no_device():
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "torch.cuda.init = torch.cuda._lazy_init = lambda: sys.exit('a device was touched');"
        "import fastlora; layer = fastlora.LoRALinear(4, 3, lora_dropout=0.5);"
        "layer(torch.randn(2, 4)).sum().backward(); print(layer.lora_B.grad is not None)"
    )
    assert run_python("-c", code) == "True"


@pytest.mark.parametrize(("name", "works"), [("torch", True), ("metal", False)])
def test_the_environment_chooses_a_backend(name, works):
    code = "import fastlora, torch; fastlora.LoRALinear(4, 3)(torch.randn(2, 4)); print('ran')"
    if works:
        assert run_python("-c", code, FASTLORA_BACKEND=name) == "ran"
    else:
        with pytest.raises(AssertionError, match="FASTLORA_BACKEND asks for the backend 'metal'"):
            run_python("-c", code, FASTLORA_BACKEND=name)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a clone holds, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source") / "fastlora"
    ignored = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def built(source) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    run_python("-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=source)
    return source / "dist"


def test_the_wheel_has_kernels_in_their_place_only(built):
    (wheel,) = built.glob("fastlora_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastlora/kernels/__init__.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastlora", "fastlora_kernels"}
    expected = {str(path.relative_to(ROOT)) for path in FILES}
    expected |= {f"fastlora/kernels/{path.name}" for path in KERNELS}
    assert expected | {"fastlora/py.typed"} <= set(names)


def test_the_sdist_builds_itself(built):
    (sdist,) = built.glob("fastlora_kernels-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "kernels/__init__.py"} <= names


def environment_with(folder: Path, *pip_arguments: str | Path) -> Path:
    """The Python of a new environment that sees this one's packages, and has ours from pip."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "outer.pth").write_text("\n".join(here))
    python = folder / "bin" / "python"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed")
    run_python(*install, *pip_arguments, python=python, cwd=folder)
    return python


@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_installation(built, source, tmp_path, how):
    wheel, editable = [*built.glob("*.whl")], ["--no-build-isolation", "--editable", source]
    python = environment_with(tmp_path / "venv", *(wheel if how == "wheel" else editable))
    home = tmp_path / "venv" if how == "wheel" else source
    code = (
        "import importlib.util, fastlora, fastlora.kernels;"
        "print(fastlora.__file__, fastlora.kernels.__file__);"
        "print(getattr(importlib.util.find_spec('kernels'), 'origin', None))"
    )
    *ours, top_level_kernels = run_python("-c", code, python=python).split()
    assert all(Path(path).is_relative_to(home) for path in ours)
    assert not Path(top_level_kernels).is_relative_to(home)
