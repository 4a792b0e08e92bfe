"""Which PEFT is imported, and whether fastlora may speed it up; this file imports nothing of PEFT.

Versions that the tests were run with are trusted.  A newer one is tried out (:mod:`.trial`), once a
process and by ``fastlora.optimize`` alone; an older one is left as it is.
"""

import os
import re
import sys
from dataclasses import dataclass

_OLDEST, _NEWEST = (0, 19), (0, 21)  # of PEFT: those that the tests were run with


@dataclass(frozen=True)
class Verdict:
    """What a trial of an untested PEFT found: why no layer runs fast, or why DoRA's alone don't."""

    version: str
    reason: str = ""
    dora: str = ""


_verdicts: list[Verdict] = []  # one at most, once there was a trial in this process


def why_never() -> str:
    """Why no layer of PEFT's runs fast in this process; "" if layers can."""
    return "FASTLORA_DISABLE is set" if is_disabled() else why_not_version()


def is_disabled() -> bool:
    """Whether ``FASTLORA_DISABLE`` asks that PEFT's layers be left alone."""
    return os.environ.get("FASTLORA_DISABLE", "") not in ("", "0")


def why_not_version() -> str:
    """Why the PEFT that is imported isn't sped up; "" if it is, or if none is."""
    numbers = _numbers()
    if numbers is None or _OLDEST <= numbers <= _NEWEST:
        return ""
    if numbers < _OLDEST:
        return f"PEFT {_version()} is not among the tested versions, {_tested()}"
    verdict = _verdict()
    if verdict is None:
        return f"{_newer()}: fastlora.optimize(model) tries it out first"
    return verdict.reason and f"{_newer()}, and {verdict.reason}"


def why_not_dora() -> str:
    """Why DoRA layers stay PEFT's where others don't; "" if they needn't."""
    verdict = _verdict()
    return f"{_newer()}, and {verdict.dora}" if verdict and verdict.dora else ""


def notes() -> tuple[str, ...]:
    """What a report says besides of a newer PEFT that agreed with fastlora."""
    verdict = _verdict()
    if verdict is None or verdict.reason:
        return ()
    return (f"{_newer()}; a few small layers gave the same numbers in a self-check",)


def is_newer() -> bool:
    """Whether the PEFT that is imported is newer than those that were tested."""
    numbers = _numbers()
    return numbers is not None and numbers > _NEWEST


def wants_trial() -> bool:
    """Whether it is a newer one, and this process hasn't tried it out."""
    return is_newer() and _verdict() is None


def pass_verdict(reason: str = "", dora: str = "") -> None:
    """Keep what a trial of the PEFT that is imported found."""
    _verdicts[:] = [Verdict(_version(), reason, dora)]


def _verdict() -> Verdict | None:
    return next((verdict for verdict in _verdicts if verdict.version == _version()), None)


def _version() -> str:
    return str(getattr(sys.modules.get("peft"), "__version__", ""))


def _numbers() -> tuple[int, ...] | None:
    """Major and minor of PEFT's version; (0, 0) if it can't be read, None if no PEFT is there."""
    if "peft" not in sys.modules:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", _version())
    return tuple(map(int, numbers.groups())) if numbers else (0, 0)


def _newer() -> str:
    return f"PEFT {_version()} is newer than the tested versions, {_tested()}"


def _tested() -> str:
    return " to ".join(".".join(map(str, version)) for version in (_OLDEST, _NEWEST))
