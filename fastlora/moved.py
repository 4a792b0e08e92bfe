"""Where pickles of release 0.1, a whole model's among them, look for classes that have moved."""

import sys
from importlib import import_module
from types import ModuleType

_PLACES = {
    "check": "peft.check",
    "config": "model.config",
    "coverage": "report",
    "inject": "model.inject",
    "integrations.peft.linear": "peft.layer",
    "layers.linear": "layer",
}


class _Moved(ModuleType):
    """A module that has another place, and is imported from there when something is asked of it."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old)
        self._new = new

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_module(self._new), name)


def keep_old_places() -> None:
    for old, new in _PLACES.items():
        name = f"{__package__}.{old}"
        sys.modules.setdefault(name, _Moved(name, f"{__package__}.{new}"))
