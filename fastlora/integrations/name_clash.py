"""Messages about other modules of the same name: ``fastlora`` on PyPI installs ``fastlora.py``.

If both are in one folder, Python imports this package, because a package precedes a module.  If
they are in two folders, Python imports the one that comes first on ``sys.path``.  pip uninstalls
either one without touching the other.
"""

import sys
from pathlib import Path

_WHAT = (
    "{} is another module of this name, such as the project fastlora on PyPI installs; `import "
    "fastlora` imports fastlora-kernels here; to remove that project: pip uninstall fastlora"
)
_CLONE = (
    "{} is a clone with the package's name: programs that start beside it import an empty fastlora "
    "(no attribute 'optimize'); rename it to fastlora-source"
)


def namesakes() -> str:
    """A message for each such module, and each clone with this name, on ``sys.path``; or ""."""
    here = Path(__file__).parents[1]
    paths = dict.fromkeys(Path(folder, here.name) for folder in [*sys.path, ""])
    modules = [path.with_suffix(".py") for path in paths]
    clones = [path for path in paths if (path / here.name / "__init__.py").is_file()]
    return "; ".join(
        [_WHAT.format(path) for path in modules if path.is_file()]
        + [_CLONE.format(path.absolute()) for path in clones if path != here]
    )
