"""Benchmarks of fastlora and other LoRA implementations; README.md describes them."""

import sys
from pathlib import Path

# ``python -m benchmarks.…`` puts the clone first, where kernels/ would hide Hugging Face's package.
_ROOT = Path(__file__).resolve().parents[1]
sys.path.sort(key=lambda folder: Path(folder).resolve() == _ROOT)
