"""Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def run_python(
    *arguments: str | Path,
    python: str | Path = sys.executable,
    cwd: str | Path = "/",
    **environment: str | None,
) -> str:
    """What it prints, outside of the repository unless ``cwd`` says so.

    ``environment`` is beside this process's, None for what shall not be in it.  An AssertionError
    with all that it wrote if it fails.
    """
    # A pytest in it is no worker of this one's.
    here = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST_")}
    merged = {key: value for key, value in (here | environment).items() if value is not None}
    result = subprocess.run(
        [python, *arguments], capture_output=True, text=True, cwd=cwd, env=merged, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def run_without_interpreter(*arguments: str | Path) -> str:
    """As :func:`run_python`, in the repository: for what may not interpret the kernels.

    ``FASTLORA_COMPILE_TRITON`` names a folder with another Triton, which then takes part.
    """
    other_triton = os.environ.get("FASTLORA_COMPILE_TRITON", "")
    root = Path(__file__).parents[2]
    return run_python(*arguments, cwd=root, TRITON_INTERPRET=None, PYTHONPATH=other_triton)
