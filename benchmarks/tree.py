"""Where fastlora is imported from: a folder that was not installed, or another commit's."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TextIO

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent


class _Tree(MetaPathFinder):
    """Finds fastlora in a folder; the benchmarks are always these here.

    ``sys.path`` could not: kernels/ is installed as fastlora.kernels (setup.py), and under its own
    name it would hide Hugging Face's package ``kernels``.
    """

    def __init__(self, root: Path) -> None:
        self.folders = {
            "fastlora": root / "fastlora",
            "fastlora.kernels": root / "kernels",
            "benchmarks": BENCHMARKS,
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        folder = self.folders.get(name)
        if folder is None or not (folder / "__init__.py").exists():
            return None
        return spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def import_from(root: Path = ROOT) -> None:
    """From now on ``import fastlora`` and ``import benchmarks`` find this folder's.

    A script's folder leaves the path, where its ``report`` or ``judge`` could be taken for others.
    """
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != BENCHMARKS]
    sys.meta_path.insert(0, _Tree(root))


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """Standard output for our lines alone: what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as lines:
        os.dup2(2, 1)
        yield lines


if __name__ == "__main__":  # python tree.py ROOT MODULE ARGUMENT ...
    import_from(Path(sys.argv[1]))
    import_module(sys.argv[2]).main(sys.argv[3:])
