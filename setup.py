"""Settings that pyproject.toml doesn't support: kernels/ is installed as fastlora.kernels.

PyPI shows README.md, whose links to files don't work there.  ``FASTLORA_REPOSITORY``, an address
such as https://github.com/OWNER/NAME, makes them links to the files of this version's tag.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REPOSITORY = os.getenv("FASTLORA_REPOSITORY", "").rstrip("/")
VERSION = re.search('__version__ = "(.+)"', (ROOT / "fastlora/version.py").read_text())[1]


def address(found: re.Match) -> str:
    picture, path = found[1] or "", found[2]
    place = "raw" if picture else "blob"
    # Paths outside of the files are GitHub's pages, such as ../../../issues.
    where = path.lstrip("./") if path.startswith("../") else f"{place}/v{VERSION}/{path}"
    return f"{picture}]({REPOSITORY}/{where})"


readme, urls = (ROOT / "README.md").read_text(), {}
if REPOSITORY:
    readme = re.sub(r"(!\[[^\[\]]*)?\]\((?!https?:|#)([^)\s]+)\)", address, readme)
    changes = f"{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md"
    urls = {"Source": REPOSITORY, "Changes": changes, "Issues": f"{REPOSITORY}/issues"}

setup(
    packages=[*find_packages(include=["fastlora", "fastlora.*"]), "fastlora.kernels"],
    package_dir={"fastlora.kernels": "kernels"},
    long_description=readme,
    long_description_content_type="text/markdown",
    project_urls=urls,
)
