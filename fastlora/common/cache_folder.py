"""The user's cache folder, whose files can be deleted at any time; and writing files atomically."""

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_SCRATCH = ".fastlora-"  # of the name of a folder with incomplete files


def cache_folder() -> Path:
    """``FASTLORA_CACHE``, or fastlora's folder in the user's cache; it may not exist yet."""
    if chosen := os.environ.get("FASTLORA_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "fastlora"


def write_whole(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write each file atomically: if the process dies, the file is the old or the new one.

    All files are written to a scratch folder first, and then renamed.  A process that dies leaves
    its scratch folder, which later calls ignore.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file, but must be a folder: give another path")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as made:
        for name, content in files.items():
            with open(Path(made) / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # the data must be on disk before the rename
        for name in files:
            os.replace(Path(made) / name, folder / name)


def is_scratch(path: Path) -> bool:
    """Whether it is a scratch folder of ``write_whole``, of a running or a dead process."""
    return path.name.startswith(_SCRATCH)


def write(path: Path, text: str) -> bool:
    """Write the file atomically.  Returns False if it can't be written; then the old file stays."""
    try:
        write_whole(path.parent, {path.name: text.encode()})
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
