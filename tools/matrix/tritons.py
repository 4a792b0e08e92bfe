"""The kernels under one Triton: their compiled code, and their launches.

Each version is installed into a folder of ``.cache/``, and used with this environment's torch.
"""

import re
import sys
from pathlib import Path

from .cells import TORCH
from .environment import ROOT, run

VERSIONS = [*dict.fromkeys(TORCH.values())]
TESTS = ("tests/kernels/test_compile.py", "tests/kernels/test_host.py")


def installed(version: str) -> Path:
    """The folder with this Triton."""
    folder = ROOT / ".cache" / f"triton-{version}"
    if not folder.joinpath("triton").exists():
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
        passed, lines = run(*pip, "--target", folder, f"triton=={version}")
        if not passed:
            raise SystemExit(lines[-1])
    return folder


def row(version: str) -> tuple[bool, list[str]]:
    """Whether everything passed with this version, and its columns of the table."""
    folder, good = str(installed(version)), True
    by = [torch.rpartition(".")[0] for torch, pinned in TORCH.items() if pinned == version]
    columns = [", ".join(by)]
    for file in TESTS:
        command = (sys.executable, "-m", "pytest", "-q", "-n", "0", file)
        passed, lines = run(*command, FASTLORA_COMPILE_TRITON=folder)
        good &= passed
        columns.append(re.sub(r" in .*", "", lines[-1].strip("= ")))
    return good, columns
