"""A row of the results, and the file that keeps all rows with the machine that gave them."""

import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

import fastlora

from .shapes import DTYPE_NAMES, Case, Target

FOLDER = Path(__file__).parent / "results"


def make_row(case: Case, table: str, targets: tuple[Target, ...], summary: dict, **more) -> dict:
    """Plain data for JSON.  ``table``: where it is shown; ``more``: what was judged before."""
    return {
        "id": case.id,
        "table": table,
        "M": case.M,
        "K": case.K,
        "N": list(case.outputs),
        "r": case.r,
        "dtype": DTYPE_NAMES[case.dtype],
        "adapter_dtype": DTYPE_NAMES[case.adapter_dtype],
        "dropout": case.dropout,
        **more,
        **summary,
        "targets": [_judge(target, summary) for target in targets],
    }


def missed(row: dict) -> list[str]:
    return [
        f"{target['quantity']} {target['ratio']} is {target['value']:.3f}, over {target['limit']:g}"
        for target in row["targets"]
        if not target["met"]
    ]


def describe_machine() -> dict:
    """What decides a time besides the code: device, instructions, threads, versions, date."""
    model, flags = _cpu()
    threads = torch.get_num_threads()
    slug = re.sub(
        r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor)\b", " ", model.lower())
    ).strip("-")
    return {
        "device": f"cpu-{slug}-{threads}-cores",
        "cpu": model,
        "threads": threads,
        "amx_bf16": "amx_bf16" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "fastlora": fastlora.__version__,
        "torch": torch.__version__,
        "peft": version("peft"),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def write_results(
    rows: list[dict],
    arguments: Sequence[str],
    folder: Path = FOLDER,
    machine: dict | None = None,
    **more,
) -> Path:
    """Write ``folder``/<device>/<date>.json, whole or not at all: beside it, and then renamed.

    A later run of the same day replaces it; ``arguments`` are the command's, which tell a partial
    run.  ``machine`` is this one's CPU, unless it is given; ``more`` stands beside it.
    """
    machine = describe_machine() if machine is None else machine
    path = folder / machine["device"] / f"{machine['date']}.json"
    texts = [str(each) for each in arguments]
    head = json.dumps({"machine": machine, "arguments": texts, **more}, ensure_ascii=False)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # a line for each row
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    unfinished.replace(path)
    return path


def _judge(target: Target, summary: dict) -> dict:
    value = summary["ratios"][target.quantity][target.ratio][1]
    return {
        "quantity": target.quantity,
        "ratio": target.ratio,
        "limit": target.limit,
        "value": value,
        "met": value <= target.limit,
    }


def _cpu() -> tuple[str, set[str]]:
    """The model's name and its instruction sets, from /proc/cpuinfo; elsewhere only a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())
