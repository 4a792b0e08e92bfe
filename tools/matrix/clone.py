"""Copy the files of a clone, so that building leaves nothing in the checkout."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Files that no clone has.
NOT_BUILT = (".*", "out", "build", "dist", "*.egg-info", "__pycache__")


def copy_of_clone(folder: Path) -> Path:
    """Copy into this folder, which must not exist."""
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_BUILT)))
