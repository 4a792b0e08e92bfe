"""conda-forge's recipe of a release, for its feedstock, made from pyproject.toml.

    python -m tools.conda_recipe dist/fastlora_kernels-0.2.0.tar.gz > recipe.yaml

The file must equal the file at PyPI, because the recipe has its digest.  ``FASTLORA_REPOSITORY`` is
the repository's address, ``FASTLORA_MAINTAINER`` the maintainer of the feedstock.
"""

import hashlib
import os
import re
import sys
from pathlib import Path

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()
# Names of packages that differ at conda-forge.
_NAMES = {"torch": "pytorch"}
_PLACE = "https://pypi.org/packages/source/f/fastlora-kernels"
_RECIPE = """\
schema_version: 1

context:
  version: "{version}"

package:
  name: fastlora-kernels
  version: ${{{{ version }}}}

source:
  url: {place}/fastlora_kernels-${{{{ version }}}}.tar.gz
  sha256: {digest}

build:
  number: 0
  noarch: python
  python:
    entry_points:
      - {script}
  script: ${{{{ PYTHON }}}} -m pip install . -vv --no-deps --no-build-isolation

requirements:
  host:
    - python ${{{{ python_min }}}}.*
    - pip
    - {setuptools}
  run:
    - python >=${{{{ python_min }}}}
{run}
  run_constraints:  # PyTorch's builds for GPUs bring it
{constraints}

tests:
  - python:
      imports:
        - fastlora
      python_version: ${{{{ python_min }}}}.*
      pip_check: false  # the wheel asks for triton on Linux, which PyTorch's CPU build hasn't

about:
  homepage: {repository}
  summary: "{summary}"
  license: {license}
  license_file: LICENSE

extra:
  recipe-maintainers:
    - {maintainer}
"""


def recipe(sdist: Path) -> str:
    """The recipe's text.  Raises SystemExit for another file than fastlora's sdist."""
    named = re.fullmatch(r"fastlora_kernels-(.+)\.tar\.gz", sdist.name)
    if not named:
        raise SystemExit(f"{sdist.name} is no sdist of fastlora-kernels: make release-check")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.M | re.S)[1]
    asked = [text.partition(";") for text in re.findall(r'^    "(.+?)"', listed, re.M)]
    run = [_in_conda_s_words(text) for text, _, marker in asked if not marker]
    constraints = [_in_conda_s_words(text) for text, _, marker in asked if marker]
    return _RECIPE.format(
        version=named[1],
        place=_PLACE,
        digest=hashlib.sha256(sdist.read_bytes()).hexdigest(),
        setuptools=_in_conda_s_words(re.search(r'^requires = \["(.+)"\]', PROJECT, re.M)[1]),
        script=re.search(r"^\[project.scripts\]\n(.+)", PROJECT, re.M)[1].replace('"', ""),
        run="\n".join(f"    - {each}" for each in run),
        constraints="\n".join(f"    - {each}" for each in constraints),
        repository=os.getenv("FASTLORA_REPOSITORY", "https://pypi.org/project/fastlora-kernels"),
        summary=re.search(r'^description = "(.+)"', PROJECT, re.M)[1],
        license=re.search(r'^license = "(.+)"', PROJECT, re.M)[1],
        maintainer=os.getenv("FASTLORA_MAINTAINER", "maintainer"),
    )


def _in_conda_s_words(requirement: str) -> str:
    name, bounds = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
    return f"{_NAMES.get(name, name)} {bounds}".strip()


if __name__ == "__main__":
    print(recipe(Path(sys.argv[1])), end="")
