"""The machine under other Tritons, each in a process with that one from ``.cache/``.

``make machine ARGS="--triton 3.6.0 3.9.0 …"``: the other words are for each of them.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

import torch
import triton

from tools.matrix.tritons import TORCH, VERSIONS, installed

# What a version does to its own plain products as well, and no kernel of ours can mend.
KNOWN = {"3.6.0": "no proxy fence"}


def pinned() -> str:
    """By this torch, or the newest by one that is newer."""
    return TORCH.get(torch.__version__.partition("+")[0], VERSIONS[-1])


def versions(asked: Sequence[str]) -> list[str]:
    """``ci``: the one that torch pins and the newest, or, where these are one, the oldest too."""
    other = pinned() if pinned() != VERSIONS[-1] else VERSIONS[0]
    named = {"ci": [other, VERSIONS[-1]]}
    return [*dict.fromkeys(each for word in asked for each in named.get(word, [word]))]


def run_under(version: str, words: Sequence[str]) -> bool:
    """``python -m tools.machine WORDS`` under this Triton; whether nothing was a miss.

    Of a word that comes twice the last one counts: ``--triton`` without a version.
    """
    allowed = ["--allow", KNOWN[version]] if version in KNOWN else []
    command = [sys.executable, "-m", "tools.machine", *words, "--triton", *allowed]
    own = {} if version == triton.__version__ else {"PYTHONPATH": str(installed(version))}
    return subprocess.run(command, env=os.environ | own, check=False).returncode == 0
