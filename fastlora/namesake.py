"""Warnings about another project of the same name: ``fastlora`` on PyPI installs ``fastlora.py``.

If both are in one folder, Python imports this package, because a package precedes a module.  If
they are in two folders, Python imports the one that comes first on ``sys.path``.  pip uninstalls
either one without touching the other.
"""

import sys
import warnings
from pathlib import Path

_WHAT = (
    "{} is another module of this name, such as the project fastlora on PyPI installs; `import "
    "fastlora` imports fastlora-kernels here; to remove that project: pip uninstall fastlora"
)


def warn_of_namesake() -> None:
    """Warn if the other module is beside this package.

    Only this one path is checked, so that ``import fastlora`` stays fast.
    """
    beside = Path(__file__).parent.with_suffix(".py")
    if beside.is_file():
        warnings.warn(_WHAT.format(beside), stacklevel=3)


def namesakes() -> str:
    """A message for each such module on ``sys.path``; "" if there is none."""
    name = Path(__file__).parent.with_suffix(".py").name
    paths = dict.fromkeys(Path(folder, name) for folder in sys.path)
    return "; ".join(_WHAT.format(path) for path in paths if path.is_file())
