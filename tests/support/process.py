"""Python in a process of its own."""

import multiprocessing
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

# Imported once, in the process that the others are forked from.
_IMPORTS = [
    "peft.utils.other",
    "torch.distributed._composable.replicate_with_fsdp",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.distributed.configuration_utils",
    "transformers.models.llama.modeling_llama",
    "triton",
]


def forkserver() -> ForkServerContext:
    """Its processes have imported torch, transformers and PEFT, and nothing of fastlora."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    return context


def run_forked(code: str, *arguments: object, **environment: str) -> str:
    """What ``code`` prints in such a process, with these ``sys.argv[1:]``."""
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""), forkserver().Pool(1) as pool:
        return pool.apply(_printed, (code, [*map(str, arguments)], environment))


def _printed(code: str, arguments: list[str], environment: dict[str, str]) -> str:
    sys.argv[1:] = arguments
    os.environ.update(environment)
    with redirect_stdout(StringIO()) as printed:
        exec(code, {})
    return printed.getvalue().strip()


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
