"""The file that keeps all rows, with the machine that gave them."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastlora

FOLDER = Path(__file__).parent / "results"
_SMI = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def describe_machine(device: torch.device) -> dict:
    """What decides a time besides the code; ``device`` names the folder of the results."""
    model, flags = _cpu()
    threads = torch.get_num_threads()
    name = f"cpu-{_slug(model)}-{threads}-cores"
    machine = {
        "device": name, "cpu": model, "threads": threads, "amx_bf16": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags, "fastlora": fastlora.__version__,
        "torch": torch.__version__, "peft": _version("peft"), "triton": _version("triton"),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }  # fmt: skip
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        machine |= {
            "device": _slug(found.name), "gpu": found.name, "cuda": torch.version.cuda,
            "capability": [found.major, found.minor], "memory": found.total_memory,
            "processors": found.multi_processor_count, "smi": _smi(),
        }  # fmt: skip
    return machine


def results_path(machine: dict, folder: Path = FOLDER) -> Path:
    """A later run of the same day has the same one."""
    return folder / machine["device"] / f"{machine['date']}.json"


def write_results(path: Path, machine: dict, arguments: Sequence[str], rows: list[dict]) -> None:
    """Whole or not at all: beside it, and then renamed.  ``arguments`` tell a partial run."""
    head = json.dumps({"machine": machine, "arguments": list(map(str, arguments))})
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # a line for each row
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    unfinished.replace(path)


def _slug(name: str) -> str:
    name = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)


def _smi() -> str | None:
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def _cpu() -> tuple[str, set[str]]:
    """The model's name and its instruction sets, from /proc/cpuinfo; elsewhere only a name."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())
