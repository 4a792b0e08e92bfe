"""PEFT's source and tests, the folder for running the tests, and other versions of PEFT."""

import inspect
import json
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

MARKERS = ["single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"]


@dataclass(frozen=True)
class Peft:
    """The tested PEFT; its folder, if any, precedes the installed PEFT on the path."""

    version: str
    folder: Path | None = None


def installed() -> Peft:
    return Peft(version("peft"))


def install(chosen: str, cache: Path) -> Peft:
    """Install this version of PEFT from PyPI into a folder of the cache."""
    folder = cache / f"installed-{chosen}"
    if not folder.is_dir():
        scratch = cache / f"installing-{chosen}"
        shutil.rmtree(scratch, ignore_errors=True)
        run_pip("install", "--no-deps", "--target", str(scratch), f"peft=={chosen}")
        scratch.rename(folder)
    return Peft(chosen, folder)


def download(peft: Peft, cache: Path) -> Path:
    """Download the source of this PEFT from PyPI into the cache; its wheel has no tests."""
    name = f"peft-{peft.version}"
    if not (cache / name).is_dir():
        place = ("--no-deps", "--no-binary", "peft", "--dest", str(cache))
        run_pip("download", *place, f"peft=={peft.version}")
        with tarfile.open(cache / f"{name}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    return cache / name


def run_pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]]
    if subprocess.run(command, check=False).returncode:
        sys.exit(
            f"pip found no {arguments[-1]}: give another --version, or --source PATH with the "
            "source of the installed PEFT"
        )


def check(source: Path, peft: Peft) -> None:
    """Exit with a message if the folder has no PEFT tests; warn if its version is another one."""
    if not (source / "tests" / "testing_common.py").is_file():
        sys.exit(f"{source} has no tests/testing_common.py: --source must be PEFT's source")
    text = (source / "src" / "peft" / "__init__.py").read_text()
    found = re.search(r'__version__ = "(.*)"', text)
    if found and found[1] != peft.version:
        print(f"Note: {source} is PEFT {found[1]}, and its tests run with PEFT {peft.version}.")


def prepare(source: Path, folder: Path) -> None:
    """Copy the tests into ``folder``, as a package, with the files that they need."""
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("conftest.py", "__pycache__")
    shutil.copytree(source / "tests", folder / "tests", ignore=ignored)
    (folder / "tests" / "__init__.py").write_text("")
    markers = "".join(f"\n    {marker}: one of PEFT's" for marker in MARKERS)
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers ={markers}\n")
    write_quotes(folder / "ybelkada" / "english_quotes_copy")


def write_quotes(folder: Path) -> None:
    """Write a data set for tests that train; datasets finds it in the working directory."""
    folder.mkdir(parents=True)
    lines = [line for line in inspect.getsource(textwrap).splitlines() if line.strip()]
    records = ({"quote": line, "author": "Python", "tags": ["code"]} for line in lines[:40])
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
