"""The visit on a rented GPU: ``modal run benchmarks/modal_visit.py`` (needs a Modal account).

    modal run benchmarks/modal_visit.py --out visit.json
    FASTLORA_MODAL_GPU=RTX-PRO-6000 modal run benchmarks/modal_visit.py     # instead of an L4

It sends this tree, runs ``benchmarks/visit.py`` there, and writes the resulting file.
"""

import os
import subprocess
import sys
from pathlib import Path

import modal

GPU = os.environ.get("FASTLORA_MODAL_GPU", "L4")
ROOT, THERE = Path(__file__).parents[1], "/root/tree"
SENT = ("fastlora", "kernels", "benchmarks", "tests", "tools")

image = modal.Image.debian_slim(python_version="3.13").uv_pip_install(
    "torch", "triton", "numpy", "safetensors", "peft", "transformers", "pytest", "pytest-benchmark"
)
for name in SENT:
    image = image.add_local_dir(ROOT / name, f"{THERE}/{name}", ignore=["**/__pycache__"])
image = image.add_local_file(ROOT / "pyproject.toml", f"{THERE}/pyproject.toml")
app = modal.App("fastlora-visit", image=image)


@app.function(gpu=GPU, timeout=1800)
def visit() -> bytes:
    """The file of the visit, even if a part of it failed."""
    out = Path("/tmp/visit.json")
    command = (sys.executable, "benchmarks/visit.py", "--out", str(out))
    subprocess.run(command, cwd=THERE, check=False)
    return out.read_bytes()


@app.local_entrypoint()
def main(out: str = "visit.json") -> None:
    made = visit.remote()
    place = Path(out)
    place.with_name(f"{place.name}.new").write_bytes(made)
    place.with_name(f"{place.name}.new").replace(place)
    print(f"{place}: {len(made):,} bytes")
