"""conda-forge's recipe of a release, for its feedstock: recipe.yaml with values of pyproject.toml.

    python -m tools.conda_recipe dist/fastlora_kernels-0.2.0.tar.gz > recipe.yaml

The file must equal the file at PyPI, because the recipe has its digest.  ``FASTLORA_REPOSITORY`` is
the repository's address, ``FASTLORA_MAINTAINER`` the maintainer of the feedstock.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

PROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()
RECIPE = Path(__file__).with_name("recipe.yaml")
# Names of packages that differ at conda-forge.
_NAMES = {"torch": "pytorch"}


def recipe(sdist: Path) -> str:
    """The recipe's text.  Raises SystemExit for another file than fastlora's sdist."""
    named = re.fullmatch(r"fastlora_kernels-(.+)\.tar\.gz", sdist.name)
    if not named:
        raise SystemExit(f"{sdist.name} is no sdist of fastlora-kernels: make release-check")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.M | re.S)[1]
    asked = [text.partition(";") for text in re.findall(r'^    "(.+?)"', listed, re.M)]
    values = {
        "version": named[1],
        "digest": hashlib.sha256(sdist.read_bytes()).hexdigest(),
        "setuptools": _in_conda_s_words(re.search(r'^requires = \["(.+)"\]', PROJECT, re.M)[1]),
        "script": re.search(r"^\[project.scripts\]\n(.+)", PROJECT, re.M)[1].replace('"', ""),
        "run": _listed(text for text, _, marker in asked if not marker),
        "constraints": _listed(text for text, _, marker in asked if marker),
        "repository": os.getenv("FASTLORA_REPOSITORY", "https://pypi.org/project/fastlora-kernels"),
        "summary": re.search(r'^description = "(.+)"', PROJECT, re.M)[1],
        "maintainer": os.getenv("FASTLORA_MAINTAINER", "maintainer"),
    }
    _, text = RECIPE.read_text().split("\n", 1)  # without the comment
    return re.sub("<([a-z]+)>", lambda name: values[name[1]], text)


def _listed(requirements: Iterable[str]) -> str:
    return "\n".join(f"    - {_in_conda_s_words(each)}" for each in requirements)


def _in_conda_s_words(requirement: str) -> str:
    name, bounds = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
    return f"{_NAMES.get(name, name)} {bounds}".strip()


if __name__ == "__main__":
    print(recipe(Path(sys.argv[1])), end="")
