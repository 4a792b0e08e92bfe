"""Measurements of plans and tiles, in memory and in files.

``fastlora.tune`` writes a file for its device to the user's cache; ``benchmarks/visit.py`` writes
one beside its results.  This module is imported at the first use of this backend, and then reads
the files of the cache.
"""

import json
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from ...common import cache_folder as cache
from .supported import kernels

_FOLDER = "tuning"
_rows: dict[Hashable, "kernels.plan.Row"] = {}  # in use


class Tuned(NamedTuple):
    """A file's rows, or why they can't be used."""

    rows: tuple = ()
    date: str = ""
    why_not: str = ""


def as_text(device: str, rows: Iterable) -> str:
    """The text of a file with these rows, measured on this device with the installed Triton."""
    head = {"device": device, "triton": triton.__version__}
    head |= {"torch": torch.__version__, "date": datetime.now(timezone.utc).date().isoformat()}
    plain = [asdict(row) for row in _by_kind(rows).values()]
    return json.dumps(head | {"rows": plain}, indent=1) + "\n"


def from_text(text: str) -> Tuned:
    """Parse a file's text.  Its rows are used only for the same Triton version."""
    try:
        fields = json.loads(text)
        version = fields["triton"]
        if version != triton.__version__:
            return Tuned(why_not=f"it is of Triton {version}, and this is {triton.__version__}")
        return Tuned(tuple(map(as_row, fields["rows"])), fields["date"])
    except Exception as error:  # a broken file mustn't break the import of this module
        return Tuned(why_not=f"it can't be read ({type(error).__name__}: {error})")


def as_row(plain: Mapping[str, Any]) -> "kernels.plan.Row":
    """The row of a dictionary from ``dataclasses.asdict``.  Raises an error for other fields."""
    plan = dict(plain["plan"])
    tiles = None if plan["gemm"] is None else kernels.gemm_config.GemmConfig(**plan["gemm"])
    return kernels.plan.Row(**{**plain, "plan": kernels.plan.Plan(**{**plan, "gemm": tiles})})


def name_of(device: torch.device) -> str:
    """The device's name in rows; "" where kernels don't run or are interpreted."""
    target = kernels.target_of(device)
    return "" if target is None else target.device


def path_of(device: str) -> Path:
    return cache.cache_folder() / _FOLDER / f"{re.sub(r'[^A-Za-z0-9]+', '-', device)}.json"


def written(device: str) -> Tuned | None:
    """The file of a device; None if there isn't one."""
    path = path_of(device)
    text = cache.read(path.parent, path.name).get(path)
    return None if text is None else from_text(text)


def described(device: str) -> str:
    """The state of a device's measurements, as text for a report."""
    if not device:
        return "not possible: it runs no compiled kernels"
    tuned, path = written(device), path_of(device)
    if tuned is None:
        return "nothing was measured: python -m fastlora tune"
    if tuned.why_not:
        return f"{path} isn't used, {tuned.why_not}: python -m fastlora tune makes a new one"
    return f"{len(tuned.rows)} products, {tuned.date}: {path}"


def load() -> None:
    """Read the files of all devices, and choose plans by them from now on."""
    for text in cache.read(cache.cache_folder() / _FOLDER, "*.json").values():
        use(from_text(text).rows)


def use(rows: Iterable) -> None:
    """Choose plans also by these rows from now on."""
    new = _by_kind(rows)
    if new:
        _rows.update(new)
        kernels.plan.use_rows(_rows.values())


def _by_kind(rows: Iterable) -> dict[Hashable, "kernels.plan.Row"]:
    """The rows by kind of call; the last row of a kind wins."""
    # The key is the row without its plan, for which any fixed plan stands.
    return {replace(row, plan=kernels.plan.IN_PLACE): row for row in rows}


def keep(device: str, rows: Iterable) -> str:
    """Choose plans also by these rows, and write them to the device's file.

    Returns the file's path, or "" if it can't be written.
    """
    load()
    use(rows)
    path = path_of(device)
    # load() comes first, so that the new file also has the rows that other processes wrote.
    text = as_text(device, [row for row in _rows.values() if row.device == device])
    return str(path) if cache.write(path, text) else ""


load()
