"""Which PEFT is imported, and whether fastlora may speed it up; this file imports nothing of PEFT.

An older one than the tests were run with is left as it is; a newer one is sped up, and named.
"""

import os
import re
import sys

_OLDEST, _NEWEST = (0, 19), (0, 21)  # of PEFT: those that the tests were run with


def why_never() -> str:
    """Why no layer of PEFT's runs fast in this process; "" if layers can."""
    return "FASTLORA_DISABLE is set" if is_disabled() else why_not_version()


def is_disabled() -> bool:
    """Whether ``FASTLORA_DISABLE`` asks that PEFT's layers be left alone."""
    return os.environ.get("FASTLORA_DISABLE", "") not in ("", "0")


def why_not_version() -> str:
    """Why the PEFT that is imported isn't sped up; "" if it is, or if none is."""
    numbers = _numbers()
    if numbers is None or numbers >= _OLDEST:
        return ""
    return f"PEFT {_version()} is not among the tested versions, {_tested()}"


def newer() -> str:
    """What to say of a PEFT that is newer than those that were tested; "" of any other."""
    numbers = _numbers()
    if numbers is None or numbers <= _NEWEST:
        return ""
    return f"PEFT {_version()} is newer than the tested versions, {_tested()}"


def _version() -> str:
    return str(getattr(sys.modules.get("peft"), "__version__", ""))


def _numbers() -> tuple[int, ...] | None:
    """Major and minor of PEFT's version; (0, 0) if it can't be read, None if no PEFT is there."""
    if "peft" not in sys.modules:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", _version())
    return tuple(map(int, numbers.groups())) if numbers else (0, 0)


def _tested() -> str:
    return " to ".join(".".join(map(str, version)) for version in (_OLDEST, _NEWEST))
