"""Another project's module of this name: ``fastlora`` on PyPI installs a file fastlora.py.

In one folder Python takes a package before a module, so this one is imported; of two folders, the
first on ``sys.path`` has what is imported.  pip takes each away without harm to the other.
"""

import sys
import warnings
from pathlib import Path

_WHAT = (
    "{} is another module of this name, such as the project fastlora on PyPI installs; `import "
    "fastlora` gives fastlora-kernels here; to remove that project: pip uninstall fastlora"
)


def warn_of_namesake() -> None:
    """Where it lies beside this package: the one file that an import can afford to look for."""
    beside = Path(__file__).parent.with_suffix(".py")
    if beside.is_file():
        warnings.warn(_WHAT.format(beside), stacklevel=3)


def namesakes() -> str:
    """What lies on all of ``sys.path``; "" for nothing."""
    name = Path(__file__).parent.with_suffix(".py").name
    paths = dict.fromkeys(Path(folder, name) for folder in sys.path)
    return "; ".join(_WHAT.format(path) for path in paths if path.is_file())
