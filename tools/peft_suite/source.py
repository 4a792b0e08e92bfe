"""PEFT's tests: their source, and the folder that they are run in."""

import inspect
import json
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from importlib.metadata import version
from pathlib import Path

MARKERS = ["single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"]


def download(cache: Path) -> Path:
    """The source of the installed PEFT, from PyPI (its wheel has no tests); kept in the cache."""
    name = f"peft-{version('peft')}"
    if (cache / name).is_dir():
        return cache / name
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "peft", "--dest", str(cache), f"peft=={version('peft')}"]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"pip found no source of {name}: give a folder that has it, by --source PATH")
    with tarfile.open(cache / f"{name}.tar.gz") as archive:
        archive.extractall(cache, filter="data")
    return cache / name


def check(source: Path) -> None:
    """End with a message if the folder has no tests of PEFT's, and warn of another version."""
    if not (source / "tests" / "testing_common.py").is_file():
        sys.exit(f"{source} has no tests/testing_common.py: --source must be PEFT's source")
    text = (source / "src" / "peft" / "__init__.py").read_text()
    found = re.search(r'__version__ = "(.*)"', text)
    if found and found[1] != version("peft"):
        print(f"Note: {source} is PEFT {found[1]}, and PEFT {version('peft')} is installed.")


def prepare(source: Path, folder: Path) -> None:
    """Copy the tests into ``folder``, as a package, with what they expect around them."""
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("conftest.py", "__pycache__")
    shutil.copytree(source / "tests", folder / "tests", ignore=ignored)
    (folder / "tests" / "__init__.py").write_text("")
    markers = "".join(f"\n    {marker}: one of PEFT's" for marker in MARKERS)
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers ={markers}\n")
    write_quotes(folder / "ybelkada" / "english_quotes_copy")


def write_quotes(folder: Path) -> None:
    """A data set for tests that train; datasets finds it by its name in the working directory."""
    folder.mkdir(parents=True)
    lines = [line for line in inspect.getsource(textwrap).splitlines() if line.strip()]
    records = ({"quote": line, "author": "Python", "tags": ["code"]} for line in lines[:40])
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
