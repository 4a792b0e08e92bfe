"""kernels/ as a package of Hugging Face's Kernel Hub; nothing is published.

    python -m tools.hub_kernel FOLDER

FOLDER gets what kernel-builder publishes (build.toml, CARD.md, torch-ext/), and the builds that it
would make, which ``kernels.get_local_kernel(Path(FOLDER))`` loads.  Triton compiles where it runs,
so that a build is the files of kernels/, as they are, beside their digests.
"""

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "kernels"
NAME, VERSION = "fastlora-kernels", 0  # what the Hub calls a version that may still change
BACKENDS = ("cuda", "rocm")
_BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""
_CARD = """\
---
library_name: kernels
license: apache-2.0
---

Triton kernels of LoRA layers: tensors in, tensors out. Docstrings have shapes and formulas. For
layers with autograd, PEFT models and quantised bases use the package `fastlora-kernels`.

```python
from kernels import get_kernel

k = get_kernel("{{ repo_id }}", version={{ version }}, trust_remote_code=True)
```

A layer, y = x Wᵀ + scale · x Aᵀ Bᵀ, and its gradients, of x [M, K], weight [N, K], lora_a [r, K],
lora_b [N, r] and dy [M, N]:

```python
y, dx, dA, dB = (torch.empty_like(t) for t in (dy, x, lora_a, lora_b))
(h,) = k.project(x, [lora_a.T], [scale], precision="ieee")
k.gemm_lowrank(y, [x], [weight.T], [h], [lora_b.T], precision="ieee")
dh = k.weight_grad(dy, [h], [dB], b=lora_b, factor=scale, precision="ieee")
k.gemm_lowrank(dx, [dy], [weight], [dh], [lora_a], precision="ieee")
k.weight_grad(x, [dh], [dA.T], precision="ieee")
```
"""


def write(folder: Path) -> None:
    """Raises FileExistsError for a folder that has such a package already."""
    package, files = NAME.replace("-", "_"), sorted(KERNELS.glob("*.py"))
    for place in ("torch-ext/" + package, *(f"build/torch-{each}" for each in BACKENDS)):
        (folder / place).mkdir(parents=True)
        for file in files:
            shutil.copy(file, folder / place)
    digests = {file.name: hashlib.sha256(file.read_bytes()).digest() for file in files}
    whole = hashlib.sha256(b"".join(digests.values())).hexdigest()[:8]
    listed = {name: base64.b64encode(digest).decode() for name, digest in digests.items()}
    for backend in BACKENDS:
        metadata = {
            "id": f"_{package}_{backend}_{whole}", "name": NAME, "version": VERSION,
            "license": "Apache-2.0", "python-depends": [], "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": listed},
        }  # fmt: skip
        text = json.dumps(metadata, indent=2) + "\n"
        (folder / "build" / f"torch-{backend}" / "metadata.json").write_text(text)
    (folder / "build.toml").write_text(_BUILD)
    (folder / "CARD.md").write_text(_CARD)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
