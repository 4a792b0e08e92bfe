"""Environments: an installed interpreter, the wheel of this tree, and packages by uv."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from glob import glob
from pathlib import Path

from .cells import Cell
from .clone import ROOT, copy_of_clone

FOLDER = ROOT / ".cache" / "matrix"
_HERE = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
UV = shutil.which("uv", path=_HERE) or "uv"
SETTINGS = {"UV_CACHE_DIR": str(ROOT / ".cache" / "uv"), "UV_PYTHON_DOWNLOADS": "never"}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> tuple[bool, list[str]]:
    """Whether the command passed, and its output, or its errors if there is no output."""
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own = SETTINGS | own | {"HF_HUB_OFFLINE": "1"} | environment
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, check=False)
    lines = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()
    if done.returncode:
        print("\n".join([*lines, *done.stderr.splitlines()][-20:]), flush=True)
    return done.returncode == 0, lines


@cache
def interpreter(version: str) -> str | None:
    """The interpreter on PATH, of pyenv, or of uv; None if none has this version."""
    root = os.environ.get("PYENV_ROOT") or str(Path.home() / ".pyenv")
    found = [shutil.which(f"python{version}"), *glob(f"{root}/versions/{version}.*/bin/python")]
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, found):  # pyenv's command on PATH may have no interpreter
        done = subprocess.run([path, "-c", ask], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return path
    passed, lines = run(UV, "python", "find", version)
    return lines[-1] if passed else None


@cache
def wheel() -> Path:
    """Build the wheel of the current tree, in a copy, so that no build files are left."""
    source, out = FOLDER / "source", FOLDER / "wheel"
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    copy_of_clone(source)
    passed, lines = run(UV, "build", "--quiet", "--wheel", "--out-dir", out, source)
    if not passed:
        raise SystemExit(f"the wheel can't be built: {lines[-1]}")
    return next(out.glob("*.whl"))


def install(cell: Cell, python: str, with_tests: bool) -> tuple[Path, str]:
    """The environment's Python, and the reason why it can't be made, or ""."""
    folder = FOLDER / cell.name
    made, lines = run(UV, "venv", "--quiet", "--clear", "--python", python, folder)
    what: Sequence[str] = [f"{wheel()}[peft,trainer]", *cell.requirements()]
    if with_tests:  # the tests read the tree
        what = ["--editable", f"{ROOT}[test,peft,trainer]", *cell.requirements()]
    if made:
        own = folder / "bin" / "python"
        made, lines = run(UV, "pip", "install", "--quiet", "--python", own, *what)
    return folder / "bin" / "python", "" if made else f"can't be installed: {lines[-1].strip()}"
