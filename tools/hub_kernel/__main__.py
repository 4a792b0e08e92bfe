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
import shutil
import sys
from pathlib import Path

KERNELS, PACKAGE = Path(__file__).parents[2] / "kernels", Path(__file__).parent / "package"
NAME, VERSION = "fastlora-kernels", 0  # the Hub's number for a version that may still change
_LICENSE = "Apache-2.0"
# Architectures whose compiled code is tested; the emulator also runs NVIDIA's.
ARCHS = {
    "cuda": ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"],
    "rocm": ["gfx942"],
}
# kernels 0.17 reads underscores here, although its documentation differs.
_BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{_LICENSE}"
backends = {json.dumps([*ARCHS])}
{{upstream}}
[torch-noarch]
cuda_capabilities = {json.dumps(ARCHS["cuda"])}
rocm_archs = {json.dumps(ARCHS["rocm"])}
"""


def write(folder: Path) -> None:
    """Write the package.  Raises FileExistsError if the folder already has one."""
    module, upstream = NAME.replace("-", "_"), os.getenv("FASTLORA_REPOSITORY", "").rstrip("/")
    # kernels/, and layers.py with autograd, which imports the launchers and so comes last.
    files = {path.name: path.read_bytes() for path in sorted(KERNELS.glob("*.py"))}
    files["layers.py"] = (PACKAGE / "layers.py").read_bytes()
    files["__init__.py"] += b"\nfrom . import layers  # noqa: E402\n"
    for place in ("torch-ext/" + module, *(f"build/torch-{each}" for each in ARCHS)):
        (folder / place).mkdir(parents=True)
        for name, text in files.items():
            (folder / place / name).write_bytes(text)
    digests = {name: hashlib.sha256(text).digest() for name, text in files.items()}
    whole = hashlib.sha256(b"".join(digests.values())).hexdigest()[:8]
    listed = {name: base64.b64encode(digest).decode() for name, digest in digests.items()}
    for backend, archs in ARCHS.items():
        metadata = {
            "id": f"_{module}_{backend}_{whole}", "name": NAME, "version": VERSION,
            "license": _LICENSE, **({"upstream": upstream} if upstream else {}),
            "python-depends": [], "backend": {"type": backend, "archs": archs},
            "digest": {"algorithm": "sha256", "files": listed},
        }  # fmt: skip
        text = json.dumps(metadata, indent=2) + "\n"
        (folder / "build" / f"torch-{backend}" / "metadata.json").write_text(text)
    named = f'upstream = "{upstream}"\n' if upstream else ""
    (folder / "build.toml").write_text(_BUILD.format(upstream=named))
    others = shutil.ignore_patterns("layers.py", "__pycache__")
    shutil.copytree(PACKAGE, folder, ignore=others, dirs_exist_ok=True)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
