"""Whether PEFT's layers can be sped up in this process: its version, and ``FASTLORA_DISABLE``."""

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
    """Why the PEFT that is imported isn't supported; "" if it is, or if none is."""
    peft = sys.modules.get("peft")
    version = getattr(peft, "__version__", "")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if peft is None or (numbers and _OLDEST <= tuple(map(int, numbers.groups())) <= _NEWEST):
        return ""
    oldest, newest = (".".join(map(str, v)) for v in (_OLDEST, _NEWEST))
    return f"PEFT {version} is not among the tested versions, {oldest} to {newest}"
