"""The user's cache folder: tuning results and the like; it can be deleted at any time."""

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``FASTLORA_CACHE``, or fastlora's folder in the user's cache; it may not exist yet."""
    chosen = os.environ.get("FASTLORA_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "fastlora"


def write(path: Path, text: str) -> bool:
    """Write the file atomically, because another process may write it now.

    Returns False if it can't be written; then the old file, if any, stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        return False
    return True


def read(folder: Path, pattern: str) -> dict[Path, str]:
    """The texts of the matching files; unreadable files are left out."""
    texts: dict[Path, str] = {}
    try:
        paths = sorted(folder.glob(pattern)) if folder.is_dir() else []
    except OSError:
        return texts
    for path in paths:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            texts[path] = path.read_text(encoding="utf-8")
    return texts
