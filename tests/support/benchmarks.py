"""Makes the repository's benchmarks/ importable from tests, as ``benchmarks``.

The repository's root is not put on sys.path, because its kernels/ would then hide the package
``kernels`` of Hugging Face.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "benchmarks")]
