"""kernels/ as a package of Hugging Face's Kernel Hub; nothing is published.

    python -m tools.hub_kernel FOLDER

FOLDER gets the inputs of kernel-builder (build.toml, flake.nix, CARD.md, torch-ext/, tests/,
benchmarks/), and the builds that it would make, which ``kernels.get_local_kernel(Path(FOLDER))``
loads.  Triton compiles at run time, so a build is the files of kernels/ and layers.py, unchanged,
with their digests.  ``FASTLORA_REPOSITORY``, if set, is named as their source.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

KERNELS, PACKAGE = Path(__file__).parents[2] / "kernels", Path(__file__).parent / "package"
BUILD = (PACKAGE / "build.toml").read_text()
# Its strings, numbers and lists are also JSON.  kernels 0.17 reads underscores in its names,
# although the documentation differs.  Version 0 is the Hub's number for a version that may still
# change.  The architectures are those whose compiled code is tested.
_SETTINGS = {name: json.loads(value) for name, value in re.findall("(.+) = (.+)", BUILD)}
# For old clients, which import a folder with the package's name in a build.
_OLD = b"""from pathlib import Path

_FILE = Path(__file__).parents[1] / "__init__.py"
__path__ = [str(_FILE.parent)]
exec(compile(_FILE.read_text(), str(_FILE), "exec"))
"""
_EXPORTS = b"""
from . import launchers, layers  # noqa: E402

__all__ = ["launchers", "layers"]
"""
ARCHS = {"cuda": _SETTINGS["cuda_capabilities"], "rocm": _SETTINGS["rocm_archs"]}


def write(folder: Path) -> None:
    """Write the package.  Raises FileExistsError if the folder already has one."""
    named = {name: _SETTINGS[name] for name in ("name", "version", "license")}
    module = named["name"].replace("-", "_")
    if upstream := os.getenv("FASTLORA_REPOSITORY", "").rstrip("/"):
        named["upstream"] = upstream
    # kernels/, and layers.py with autograd, which imports the launchers and so comes last.
    files = {path.name: path.read_bytes() for path in sorted(KERNELS.glob("*.py"))}
    files["layers.py"] = (PACKAGE / "layers.py").read_bytes()
    files["__init__.py"] += _EXPORTS
    for place in ("torch-ext/" + module, *(f"build/torch-{each}" for each in ARCHS)):
        (folder / place).mkdir(parents=True)
        for name, text in files.items():
            (folder / place / name).write_bytes(text)
    files[f"{module}/__init__.py"] = _OLD
    digests = {name: hashlib.sha256(text).digest() for name, text in files.items()}
    whole = hashlib.sha256(b"".join(digests.values())).hexdigest()[:8]
    listed = {name: base64.b64encode(digest).decode() for name, digest in digests.items()}
    for backend, archs in ARCHS.items():
        (folder / f"build/torch-{backend}" / module).mkdir()
        (folder / f"build/torch-{backend}" / module / "__init__.py").write_bytes(_OLD)
        metadata = {
            "id": f"_{module}_{backend}_{whole}", **named,
            "python-depends": [], "backend": {"type": backend, "archs": archs},
            "digest": {"algorithm": "sha256", "files": listed},
        }  # fmt: skip
        text = json.dumps(metadata, indent=2) + "\n"
        (folder / "build" / f"torch-{backend}" / "metadata.json").write_text(text)
    others = shutil.ignore_patterns("layers.py", "__pycache__")
    shutil.copytree(PACKAGE, folder, ignore=others, dirs_exist_ok=True)
    if upstream:
        text = BUILD.replace("\n\n", f'\nupstream = "{upstream}"\n\n')
        (folder / "build.toml").write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
