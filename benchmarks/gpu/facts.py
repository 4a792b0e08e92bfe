"""What the device is, and how fast it multiplies and copies at best, measured here and now."""

import shutil
import statistics
import subprocess
import sysconfig
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastlora
from fastlora.kernels import target_of

from .timing import Clock, whole

_SMI = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def describe_device(device: torch.device, dry: bool) -> dict:
    """The ``machine`` of the results; ``device`` names the folder they go into."""
    if not dry and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU that torch can use: --dry runs without one")
    target = target_of(device)
    facts = {
        "device": "dry",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "fastlora": fastlora.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "target": None if target is None else asdict(target),
        "compiler": shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),
        "python_headers": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "ncu": shutil.which("ncu"),
    }
    facts |= {
        name: _version(name) for name in ("triton", "peft", "transformers", "pytest", "numpy")
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": "-".join(properties.name.lower().replace("/", " ").split()),
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": getattr(properties, "L2_cache_size", None),
            "smi": _smi(),
        }
    return facts


def ceilings(clock: Clock, device: torch.device, dry: bool) -> dict[str, float]:
    """flops and bytes a second: a large bfloat16 product by torch, a large copy."""
    size, elements = (64, 2**12) if dry else (8192, 2**29)
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    source = torch.zeros(elements, dtype=torch.int16, device=device)
    copy = torch.empty_like(source)
    product = _best(clock, lambda: left @ right)
    return {
        "flops": 2 * size**3 / product,
        "bytes": 2 * 2 * elements / _best(clock, lambda: copy.copy_(source)),
    }


def _best(clock: Clock, call) -> float:
    times = [clock.time(whole(call))[0] for _ in range(10)]
    return statistics.median(sorted(times)[:5])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _smi() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or done.stderr.strip()
