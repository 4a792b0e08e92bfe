"""The times of each release: ``make bench ARGS=--release`` measures the rows of this one.

``python benchmarks/releases.py`` prints a table of its results files, one for each version and
device.  All numbers are ratios within one run, because times of different runs can't be compared.
"""

import json
import re
from pathlib import Path

try:
    from .report import pipes
except ImportError:  # run as a file
    from report import pipes

RESULTS = Path(__file__).parent / "results"
# Typical uses: a layer, DoRA, a gated MLP, experts, a quantized base, and a step of a model.
ROWS = {
    "2048x2048x2048-f32-r16-p0.1": "a layer",
    "layer-dora-1024x1024x1024-f32-r16-p0.1": "DoRA",
    "quantized-nf4-512x2048x2048-f32-r16-p0.1": "over NF4",
    "qwen3-0.6b-mlp-512x1024x3072-f32-r16-p0.1": "a gated MLP",
    "experts-512x1024x384-32top4-f32-r8-p0": "experts",
    "qwen3-0.6b-step-512x1024x3072-4layers-f32-r16-p0.05": "a step",
}


def releases(folder: Path = RESULTS) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Each row's ratio of fastlora's time to PEFT's, with quartiles, by device and version.

    The last file of a version counts.
    """
    of_release = {}
    for path in sorted(folder.glob("*/release-*.json"), key=_order):
        file = json.loads(path.read_text())
        of_row = {
            ROWS[row["id"]]: row["ratios"]["both"]["fastlora/peft"]
            for row in file["rows"]
            if row["id"] in ROWS and "fastlora/peft" in row["ratios"].get("both", {})
        }
        machine = file["machine"]
        named = f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch'].split('+')[0]}"
        of_release[named, machine["fastlora"]] = of_row
    return of_release


def _order(path: Path) -> tuple[str, list[int]]:
    """The folder, and the numbers of the file's version and date."""
    return path.parent.name, [*map(int, re.findall(r"\d+", path.stem))]


def table(folder: Path = RESULTS) -> str:
    lines = [("machine", "release", *ROWS.values())]
    for (machine, version), rows in releases(folder).items():
        numbers = [f"{rows[name][1]:.2f}" if name in rows else "–" for name in ROWS.values()]
        lines.append((machine, version, *numbers))
    return pipes(lines)


if __name__ == "__main__":
    print(table())
