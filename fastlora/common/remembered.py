"""A dict as a cache of calls, of limited size."""

from collections.abc import Hashable
from threading import Lock
from typing import Any

MOST = 1024  # entries; a captured call of a layer takes about 15 kB
_changes = Lock()  # protects insertion and the deletion of the oldest entry; lookups need no lock


def remember(calls: dict[Hashable, Any], key: Hashable, call: Any, most: int | None = None) -> None:
    """Store the call under this key.  A cache with ``most`` entries (or MOST) drops its oldest."""
    # A dict keeps the order of insertion, so its first key is the oldest.
    with _changes:
        while len(calls) >= (most or MOST):
            del calls[next(iter(calls))]
        calls[key] = call
