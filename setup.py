"""What pyproject.toml can't say: kernels/ is installed as fastlora.kernels, not as kernels.

And PyPI shows README.md, where links to files lead nowhere.  ``FASTLORA_REPOSITORY``, an address
such as https://github.com/OWNER/NAME, makes them links to the files of this version's tag there.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REPOSITORY = os.getenv("FASTLORA_REPOSITORY", "").rstrip("/")
VERSION = re.search('__version__ = "(.+)"', (ROOT / "fastlora/version.py").read_text())[1]


def address(found: re.Match) -> str:
    picture, text, path = found[1], found[2], found[3]
    place = "raw" if picture else "blob"
    # What leaves the files are GitHub's own pages, such as ../../../issues.
    where = path.lstrip("./") if path.startswith("../") else f"{place}/v{VERSION}/{path}"
    return f"{picture}[{text}]({REPOSITORY}/{where})"


readme, urls = (ROOT / "README.md").read_text(), {}
if REPOSITORY:
    readme = re.sub(r"(!?)\[([^\[\]]*)\]\((?!https?:|#)([^)\s]+)\)", address, readme)
    changes = f"{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md"
    urls = {"Source": REPOSITORY, "Changes": changes, "Issues": f"{REPOSITORY}/issues"}

setup(
    packages=[*find_packages(include=["fastlora", "fastlora.*"]), "fastlora.kernels"],
    package_dir={"fastlora.kernels": "kernels"},
    long_description=readme,
    long_description_content_type="text/markdown",
    project_urls=urls,
)
