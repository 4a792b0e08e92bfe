"""The Triton that each torch pins; and each Triton in a folder, beside this environment's torch."""

import subprocess
import sys
from pathlib import Path

# Oldest first.
TORCH = {
    "2.10.0": "3.6.0",
    "2.11.0": "3.6.0",
    "2.12.1": "3.7.1",
    "2.13.0": "3.7.1",
    "2.14.1": "3.8.0",
    "2.15.0": "3.9.0",
}
VERSIONS = [*dict.fromkeys(TORCH.values())]


def installed(version: str) -> Path:
    """The folder with this Triton, which pip installs at the first call."""
    folder = Path(__file__).resolve().parents[2] / ".cache" / f"triton-{version}"
    if not folder.joinpath("triton").exists():
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
        subprocess.run([*pip, "--target", folder, f"triton=={version}"], check=True)
    return folder
