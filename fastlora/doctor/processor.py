"""The name of this machine's processor."""

import platform
import re
from pathlib import Path


def processor_name() -> str:
    """Its model on Linux; elsewhere what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")  # only Linux has it
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return names[0] if names else platform.processor() or platform.machine()
