"""PEFT's models, sped up in place.

:mod:`.layer` is what a layer becomes, and does and undoes it; :mod:`.read` says which calls it
takes.  This folder alone imports PEFT, and only where a model with PEFT's layers is met:
:mod:`.optimize` and :mod:`.check` do without.

A PEFT that is older than those the tests were run with is left as it is; a newer one is sped up,
and named.
"""

import os
import re
import sys
from importlib import import_module

_OLDEST, _NEWEST = (0, 19), (0, 21)  # of PEFT: those that the tests were run with
_TESTED = "the tested versions, 0.19 to 0.21"


def is_disabled() -> bool:
    """Whether ``FASTLORA_DISABLE`` asks that PEFT's layers be left alone."""
    return os.environ.get("FASTLORA_DISABLE", "") not in ("", "0")


def why_never() -> str:
    """Why no layer of PEFT's runs fast in this process; "" if layers can."""
    return "FASTLORA_DISABLE is set" if is_disabled() else _why_not_version()


def why_not_peft() -> str:
    """Why no layer of the PEFT that is imported can be looked at; "" if they can."""
    if newer():
        try:
            for name in ("records", "layer"):
                import_module(f".{name}", __name__)
        except ImportError as error:
            return f"{newer()}, and has moved what fastlora reads ({error})"
    return _why_not_version()


def why_nothing_changes() -> str:
    """Why optimize leaves every layer as it is; or ""."""
    return why_never() or why_not_peft()


def untested() -> str:
    """What to do about a PEFT that is newer than the tested versions; "" if it isn't."""
    return newer() and (
        f"{newer()}: fastlora.check(model, batch) compares your model's numbers with PEFT's own, "
        "and python -m fastlora doctor those of small layers"
    )


def newer() -> str:
    """What to say of a PEFT that is newer than those that were tested; "" of any other."""
    version, numbers = _version()
    return f"PEFT {version} is newer than {_TESTED}" if numbers > _NEWEST else ""


def _why_not_version() -> str:
    """Why the PEFT that is imported isn't sped up; "" if it is, or if none is."""
    version, numbers = _version()
    return f"PEFT {version} is not among {_TESTED}" if numbers < _OLDEST else ""


def _version() -> tuple[str, tuple[int, ...]]:
    """Of the PEFT that is imported: as it says it, and major and minor, 0 if they can't be read."""
    if "peft" not in sys.modules:
        return "", _NEWEST
    version = str(getattr(sys.modules["peft"], "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return version, tuple(map(int, numbers.groups())) if numbers else (0, 0)
