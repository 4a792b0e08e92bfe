"""The emulator with other Tritons, each installed into ``.cache/`` and run in a separate process.

``make machine ARGS="--triton 3.6.0 3.9.0 …"`` passes the other words to each of them.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

import torch
import triton

from tools.matrix.tritons import TORCH, VERSIONS, installed

# Faults of a version that also affect its plain products, so no kernel here can avoid them.
KNOWN = {"3.6.0": "no proxy fence"}


def pinned() -> str:
    """The Triton that this torch pins; for a torch newer than the table, the newest."""
    return TORCH.get(torch.__version__.partition("+")[0], VERSIONS[-1])


def versions(asked: Sequence[str]) -> list[str]:
    """The versions.  ``ci`` is torch's pin and the newest; if they are equal, the oldest also."""
    other = pinned() if pinned() != VERSIONS[-1] else VERSIONS[0]
    named = {"ci": [other, VERSIONS[-1]]}
    return [*dict.fromkeys(each for word in asked for each in named.get(word, [word]))]


def run_under(version: str, words: Sequence[str]) -> bool:
    """Run ``python -m tools.machine WORDS`` with this Triton.  Returns whether no case missed.

    ``--triton`` is repeated without a version, because the last of two equal options counts.
    """
    allowed = ["--allow", KNOWN[version]] if version in KNOWN else []
    command = [sys.executable, "-m", "tools.machine", *words, "--triton", *allowed]
    own = {} if version == triton.__version__ else {"PYTHONPATH": str(installed(version))}
    return subprocess.run(command, env=os.environ | own, check=False).returncode == 0
