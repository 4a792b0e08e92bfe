"""A copy of what a clone holds, where building leaves nothing in the checkout."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a build leaves out, since no clone has it.
NOT_BUILT = (".*", "out", "build", "dist", "*.egg-info", "__pycache__")


def copy_of_clone(folder: Path) -> Path:
    """In this folder, which must not exist."""
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_BUILT)))
