"""The benchmarks, for tests to import.

Not by the path: the repository's kernels/ would hide Hugging Face's package of that name.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "benchmarks")]
