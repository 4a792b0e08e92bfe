"""The tested package, its tests, and the folder in which they run."""

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

from .suite import Suite


@dataclass(frozen=True)
class Package:
    """The tested package; its folder, if any, precedes the installed package on the path."""

    version: str
    folder: Path | None = None


def installed_peft() -> Package:
    return Package(version("peft"))


def install_peft(chosen: str, cache: Path) -> Package:
    """Install this version of PEFT from PyPI into a folder of the cache."""
    folder = cache / f"installed-{chosen}"
    if not folder.is_dir():
        scratch = cache / f"installing-{chosen}"
        shutil.rmtree(scratch, ignore_errors=True)
        run_pip("install", "--no-deps", "--target", str(scratch), f"peft=={chosen}")
        scratch.rename(folder)
    return Package(chosen, folder)


def download_peft(peft: Package, cache: Path) -> Path:
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
            f"pip found no {arguments[-1]}: give another --version, or the path of the source of "
            "the installed PEFT"
        )


def version_of(suite: Suite, source: Path) -> str:
    """The version of this project's source.  Exits with a message if the folder has no such."""
    for path in (source / "tests", source / suite.version_file):
        if not path.exists():
            sys.exit(f"there is no {path}: give the path of a checkout of {suite.title}")
    text = (source / suite.version_file).read_text()
    return re.search(r'(?:\A|__version__ = ")(\d[^\s"]*)', text)[1]


def prepare(suite: Suite, source: Path, folder: Path) -> None:
    """Copy the tests into ``folder``, as a package, with the files that they need."""
    shutil.rmtree(folder, ignore_errors=True)
    # The releases of PEFT have no conftest.py, so the plugin adds its option.
    ignored = ["__pycache__"] if suite.package else ["__pycache__", "conftest.py"]
    for part in suite.parts:
        ignore = shutil.ignore_patterns(*ignored)
        shutil.copytree(source / part, folder / part, ignore=ignore)
    (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    write_quotes(folder / "ybelkada" / "english_quotes_copy")


def write_quotes(folder: Path) -> None:
    """Write a data set for PEFT's tests; datasets finds it in the working directory."""
    folder.mkdir(parents=True)
    lines = [line for line in inspect.getsource(textwrap).splitlines() if line.strip()]
    records = ({"quote": line, "author": "Python", "tags": ["code"]} for line in lines[:40])
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
