"""The user's cache folder: tuning results and the like; it can be deleted at any time."""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory


def cache_folder() -> Path:
    """``FASTLORA_CACHE``, or fastlora's folder in the user's cache; it may not exist yet."""
    if chosen := os.environ.get("FASTLORA_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "fastlora"


def write(path: Path, text: str) -> bool:
    """Write the file atomically, because another process may write it now.

    Returns False if it can't be written; then the old file, if any, stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
            whole = Path(folder, path.name)
            whole.write_text(text, encoding="utf-8")
            os.replace(whole, path)
    except OSError:
        return False
    return True


def read(folder: Path, pattern: str) -> dict[Path, str]:
    """The texts of the matching files; unreadable files are left out."""
    texts: dict[Path, str] = {}
    with suppress(OSError):
        for path in sorted(folder.glob(pattern)):
            with suppress(OSError, UnicodeDecodeError):
                texts[path] = path.read_text(encoding="utf-8")
    return texts
