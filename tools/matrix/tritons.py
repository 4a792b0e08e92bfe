"""The kernels alone under a Triton: what the compiler makes of them, launches, the machine.

Each version is installed into ``.cache/`` by itself, beside this environment's torch.
"""

import re
import sys
from pathlib import Path

from .cells import TORCH
from .environment import ROOT, UV, run

VERSIONS = [*dict.fromkeys(TORCH.values())]
TESTS = ("tests/kernels/test_compile.py", "tests/kernels/test_host.py")
# What a version does to its own plain products as well, and no kernel of ours can mend.
KNOWN = {"3.6.0": "no proxy fence"}


def installed(version: str) -> Path:
    """The folder with this Triton."""
    folder = ROOT / ".cache" / f"triton-{version}"
    if not folder.joinpath("triton").exists():
        pip = (UV, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable)
        passed, lines = run(*pip, "--target", folder, f"triton=={version}")
        if not passed:
            raise SystemExit(lines[-1])
    return folder


def row(version: str) -> tuple[bool, list[str]]:
    """Whether everything passed under this version, and its columns of the table."""
    folder, good = str(installed(version)), True
    by = [torch.rpartition(".")[0] for torch, pinned in TORCH.items() if pinned == version]
    columns = [", ".join(by)]
    for file in TESTS:
        command = (sys.executable, "-m", "pytest", "-q", "-n", "0", file)
        passed, lines = run(*command, FASTLORA_COMPILE_TRITON=folder)
        good &= passed
        columns.append(re.sub(r" in .*", "", lines[-1].strip("= ")))
    for target in ("sm_80", "sm_90"):
        command = (sys.executable, "-m", "tools.machine", "--quick", "--misses", "--target", target)
        known = KNOWN.get(version, "") if target == "sm_90" else ""
        passed, lines = run(*command, "--allow", known, PYTHONPATH=folder)
        good &= passed
        what = lines[-1].partition(": ")[2].partition(";")[0]
        columns.append(what + (f", {known}" if known else ""))
    return good, columns
