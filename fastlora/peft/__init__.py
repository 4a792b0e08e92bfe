"""PEFT's models, sped up in place.

:mod:`.layer` defines the classes of fast layers, and changes layers to them and back.
:mod:`.read` decides which calls run fast.  No other package imports PEFT, and this one imports it
only for a model with PEFT's layers: :mod:`.optimize` and :mod:`.check` import nothing of PEFT.

Layers of a PEFT older than the tested versions don't change.  A newer PEFT is sped up, with a
warning.
"""

import os
import re
import sys
from importlib import import_module

_OLDEST, _NEWEST = (0, 18), (0, 21)  # the versions of PEFT that the tests run with
_INJECTS = (0, 20)  # the oldest version whose injection takes every base
_TESTED = "the tested versions, 0.18 to 0.21"


def is_disabled() -> bool:
    """Whether ``FASTLORA_DISABLE`` is set, so that PEFT's layers don't change."""
    return os.environ.get("FASTLORA_DISABLE", "") not in ("", "0")


def why_never() -> str:
    """Why no PEFT layer can run fast in this process; "" if layers can."""
    return "FASTLORA_DISABLE is set" if is_disabled() else _why_not_version()


def why_not_peft() -> str:
    """Why fastlora can't read layers of the imported PEFT; "" if it can."""
    if newer():
        try:
            for name in ("records", "layer"):
                import_module(f".{name}", __name__)
        except ImportError as error:
            return f"{newer()}, and has moved what fastlora reads ({error})"
    return _why_not_version()


def why_nothing_changes() -> str:
    """Why optimize changes no layer; "" if it does."""
    return why_never() or why_not_peft()


def untested() -> str:
    """Advice for a PEFT that is newer than the tested versions; "" for any other."""
    return newer() and (
        f"{newer()}: fastlora.check(model, batch) compares your model's numbers with PEFT's own, "
        "and python -m fastlora doctor those of small layers"
    )


def newer() -> str:
    """A statement that PEFT is newer than the tested versions; "" if it isn't."""
    version, numbers = _version()
    return f"PEFT {version} is newer than {_TESTED}" if numbers > _NEWEST else ""


def why_no_injection() -> str:
    """Why ``get_peft_model`` and ``load_adapter`` can't run with the installed PEFT; or ""."""
    need = "needs PEFT 0.20 or newer: pip install 'peft>=0.20'"
    try:
        import_module("peft")
    except ImportError:
        return f"fastlora.get_peft_model {need}"
    version, numbers = _version()
    return f"fastlora.get_peft_model {need} (this is {version})" if numbers < _INJECTS else ""


def _why_not_version() -> str:
    """Why the imported PEFT isn't sped up; "" if it is, or if PEFT isn't imported."""
    version, numbers = _version()
    return f"PEFT {version} is not among {_TESTED}" if numbers < _OLDEST else ""


def _version() -> tuple[str, tuple[int, ...]]:
    """The imported PEFT's version as text, and (major, minor): (0, 0) if that can't be read."""
    if "peft" not in sys.modules:
        return "", _NEWEST
    version = str(getattr(sys.modules["peft"], "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return version, tuple(map(int, numbers.groups())) if numbers else (0, 0)
