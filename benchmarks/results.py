"""The results file: all rows, and the machine that measured them."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastlora
from fastlora.doctor.machine import processor_flags, processor_name, version_of

FOLDER = Path(__file__).parent / "results"
_ASKED = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
_SMI = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]


def describe_machine(device: torch.device) -> dict:
    """Everything except the code that affects times; ``device`` names the folder of the results."""
    cpu, flags, threads = processor_name(), processor_flags(), torch.get_num_threads()
    machine = {
        "device": f"cpu-{_slug(cpu)}-{threads}-cores", "cpu": cpu, "threads": threads,
        "amx_bf16": "amx_bf16" in flags, "avx512_bf16": "avx512_bf16" in flags,
        "kept_to": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "fastlora": fastlora.__version__, "torch": torch.__version__,
        "peft": version_of("peft") or None, "triton": version_of("triton") or None,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }  # fmt: skip
    if device.type == "cuda":
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(_SMI, capture_output=True, text=True, timeout=20)
            machine["smi"] = done.stdout.strip()
        gpu = torch.cuda.get_device_name(device)
        machine |= {"device": _slug(gpu), "gpu": gpu, "cuda": torch.version.cuda}
    return machine


def results_path(machine: dict, folder: Path = FOLDER, name: str = "") -> Path:
    """The path of the results file; a later run of the same day has the same path."""
    return folder / machine["device"] / f"{name}{'-' * bool(name)}{machine['date']}.json"


def write_results(path: Path, machine: dict, arguments: Sequence[str], rows: list[dict]) -> None:
    """Write the file completely or not at all; ``arguments`` show which part of the rows ran."""
    head = json.dumps({"machine": machine, "arguments": list(map(str, arguments))})
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # a line for each row
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    unfinished.replace(path)


def _slug(name: str) -> str:
    name = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
