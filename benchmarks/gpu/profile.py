"""Bytes between memory and L2 during one fused product, as NVIDIA's profiler counts them."""

import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path

_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_SECONDS, _GRACE = 40.0, 12.0  # it may run so long beyond the step's deadline
_SCRIPT = Path(__file__).resolve().parent.parent / "gpu_visit.py"


def dram_bytes(folder: Path, deadline: float) -> dict:
    """Metric to value and unit, or why there is none: the profiler is seldom there, or allowed."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return {"why_not": "ncu is not on the PATH"}
    seconds = min(_SECONDS, deadline + _GRACE - time.time())
    step = [str(_SCRIPT), "--step", "product", str(folder), str(deadline), "0"]
    command = [
        ncu, "--csv", "--metrics", ",".join(_METRICS), "-k", "regex:gemm_lowrank", "-c", "1",
        sys.executable, "-P", *step,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"why_not": f"ncu took more than {seconds:.0f} s"}
    found = parse(done.stdout)
    return found or {"why_not": (done.stdout + done.stderr)[-600:]}


def parse(text: str) -> dict[str, str]:
    """ncu's CSV, which follows lines of its own and of the program's."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    return {
        row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}"
        for row in csv.DictReader(lines)
        if row.get("Metric Name") in _METRICS
    }
