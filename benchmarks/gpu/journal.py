"""What a step has begun and what came of it: a JSON line each, so that a crash loses one item."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOST = 75  # exit status of a step whose device no longer answers: start again in a new process


class Journal:
    """Rows and failures of one step.  ``deadline``: when no item is begun any more."""

    def __init__(self, path: Path, deadline: float = float("inf")) -> None:
        self.path, self.deadline = path, deadline
        self.begun: set[str] = set()
        for entry in self._entries():
            self.begun |= {entry["begin"]} if "begin" in entry else set()
            self.begun -= {entry["again"]} if "again" in entry else set()

    @property
    def rows(self) -> list[dict]:
        return [entry["row"] for entry in self._entries() if "row" in entry]

    @property
    def failures(self) -> list[dict]:
        """Each with the item's name, and its part if one is to blame, and the error's text."""
        return [entry for entry in self._entries() if "failed" in entry]

    @property
    def skipped(self) -> list[str]:
        """What there was no time for."""
        return [entry["skipped"] for entry in self._entries() if "skipped" in entry]

    def banned(self, item: str) -> set[str]:
        """Parts that ended the process in this item, or in three others."""
        lost = [(each["again"], each["part"]) for each in self._entries() if "again" in each]
        parts = [part for _, part in lost]
        return {part for name, part in lost if name == item or parts.count(part) >= 3}

    def add(self, row: dict) -> None:
        self._write({"row": row})

    def fail(self, name: str, error: str) -> None:
        self._write({"failed": name, "error": error})

    def doing(self, part: str | None) -> None:
        """Who is to blame from here on, if the process ends: a part of the item, or nobody."""
        self._write({"doing": part})

    def close_unfinished(self, error: str) -> bool:
        """Whether the process ended within an item.  It failed; without the part it goes again."""
        item = part = None
        for entry in self._entries():
            if "begin" in entry:
                item, part = entry["begin"], None
            elif "doing" in entry:
                part = entry["doing"]
            elif "end" in entry or "failed" in entry:
                item = None
        if item is None:
            return False
        self.fail(item if part is None else f"{item}, {part}", error)
        if part is not None:
            self._write({"again": item, "part": part})
        return True

    def wants(self, name: str) -> bool:
        """Whether an item is still to be done, and there is time to begin it."""
        if name in self.begun:
            return False
        if time.time() > self.deadline:
            if name not in self.skipped:
                self._write({"skipped": name})
            return False
        return True

    @contextmanager
    def item(self, name: str) -> Iterator[None]:
        """Run the block as one item: its exception is recorded, and the next item may run."""
        self.begun.add(name)
        self._write({"begin": name})
        try:
            yield
        except Exception as error:
            self.fail(name, describe(error))
            check_device()
        else:
            self._write({"end": name})

    def _entries(self) -> list[dict]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def _write(self, entry: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def describe(error: Exception) -> str:
    """Kind and text, cut where a compiler is verbose, and the place in the sources."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = str(error)
    text = text if len(text) <= 1500 else f"{text[:1000]} … {text[-500:]}"
    return f"{type(error).__name__}: {text}{place}"


def check_device() -> None:
    """Wait for the device, and end the process if it was lost: after that every call fails."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(LOST)  # leaving in order would call the device again
