"""This machine's processor: its name, and what it can do."""

import platform
import re
from functools import cache
from pathlib import Path


def processor_name() -> str:
    """Its model on Linux; elsewhere what Python knows."""
    return _first("model name") or platform.processor() or platform.machine()


def processor_flags() -> list[str]:
    """Names of its instructions (avx512_bf16, amx_bf16 …), on Linux; elsewhere none."""
    return (_first("flags") or _first("Features")).split()


@cache
def _first(entry: str) -> str:
    """What the first core has under this name, or ""."""
    cpuinfo = Path("/proc/cpuinfo")  # only Linux has it
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(rf"^{entry}\s*: (.+)", text, re.M)
    return found[1] if found else ""
