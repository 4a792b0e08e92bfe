"""The report: the text that a bug report needs.

Packages are imported to see whether they can be, by their names; nothing of theirs is used here.
"""

import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..backends import BACKENDS, backend_name, find_backend
from ..backends.products import is_slow
from ..peft.coverage import untested
from ..peft.optimize import why_nothing_changes
from ..projection import HALF_DTYPES
from ..table import columns
from ..version import __version__
from .call import Call, plan
from .dtypes import name_of
from .processor import processor_name
from .self_test import TOLERANCES, peft_checks, relative_errors

_SETTINGS = re.compile(
    "(FASTLORA|TRITON)_.+|(OMP|MKL)_NUM_THREADS|ATEN_CPU_CAPABILITY|(ONEDNN|DNNL)_MAX_CPU_ISA"
    "|(CUDA|HIP|ROCR)_VISIBLE_DEVICES|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
)


@dataclass
class Report:
    """Sections of names and texts, and what is broken.  Prints as about a screen of text."""

    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**self.sections, "broken": self.broken}

    def __str__(self) -> str:
        lines = []
        for title, entries in self.sections.items():
            lines += [title, *(f"  {line}" for line in columns(entries.items(), left=2))]
        lines += [f"BROKEN: {text}" for text in self.broken] or ["nothing is broken"]
        return "\n".join(lines)


def examine(call: Call | None = None) -> Report:
    """Look at everything; what fails on the way is in ``broken``, and the rest goes on."""
    report, devices = Report(), _devices()
    broken = report.broken
    sections: dict[str, Callable[[], dict[str, str]]] = {
        "machine": lambda: _machine(devices),
        "versions": lambda: _versions(broken),
        "fastlora.optimize": _optimize,
        "installation": _installation,
        "settings": _settings,
        "backends": lambda: _backends(devices, broken),
        "16-bit products": lambda: _products(devices),
        "plan": lambda: plan(call, devices[-1]) if call else {},
        "self-test, relative errors": lambda: _self_tests(devices, broken),
    }
    for title, section in sections.items():
        try:
            entries = section()
        except Exception as error:
            broken.append(f"{title}: {_one_line(error)}")
        else:
            report.sections |= {title: entries} if entries else {}
    return report


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _devices() -> list[torch.device]:
    """The CPU, and the first accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    others = [] if accelerator is None else [torch.device(accelerator.type, 0)]
    return [torch.device("cpu"), *others]


def _machine(devices: list[torch.device]) -> dict[str, str]:
    gpus = Counter(map(_gpu, range(torch.cuda.device_count())))
    accelerators = [f"{count} x {gpu}" for gpu, count in gpus.items()]
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "system": platform.platform(),
        "processor": f"{processor_name()}, {capability}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "accelerator": ", ".join(accelerators or [d.type for d in devices[1:]]) or "none",
    }


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    arch = f"sm_{properties.major}{properties.minor}"
    arch = properties.gcnArchName if torch.version.hip else arch
    return f"{properties.name}, {arch}, {properties.total_memory / 2**30:.0f} GiB"


def _versions(broken: list[str]) -> dict[str, str]:
    found = {"fastlora": __version__, "Python": platform.python_version()}
    found["torch"] = torch.__version__
    for name in ("triton", "transformers", "peft"):
        try:
            found[name] = str(getattr(import_module(name), "__version__", "unknown"))
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            found[name] = "not installed" if missing else "can't be imported"
            if not missing:
                broken.append(f"{name} is installed, but can't be imported: {_one_line(error)}")
    has_hopper = any(
        torch.cuda.get_device_capability(i)[0] == 9 for i in range(torch.cuda.device_count())
    )
    found["triton"] += note_of_triton(found["triton"], has_hopper)
    return found


def note_of_triton(version: str, has_hopper: bool) -> str:
    """What is known of a version's code, whatever kernel it is of."""
    if not has_hopper or not version.startswith(("3.4.", "3.5.", "3.6.")):
        return ""
    return (
        ": before 3.7 its products on Hopper lack a fence between a copy and its reader. Nobody "
        "has seen a wrong number of it; torch 2.13 comes with 3.7.1"
    )


def _optimize() -> dict[str, str]:
    """Whether it takes the PEFT that is imported."""
    if not sys.modules.get("peft"):
        return {}
    reason = why_nothing_changes()
    return {"PEFT": f"not supported: {reason}" if reason else untested() or "supported"}


def _installation() -> dict[str, str]:
    package = __package__.partition(".")[0]
    specs = {name: find_spec(name) for name in (package, f"{package}.kernels")}
    return {
        name: str(Path(spec.origin).parent) if spec and spec.origin else "missing"
        for name, spec in specs.items()
    }


def _settings() -> dict[str, str]:
    found = {name: os.environ[name] for name in sorted(os.environ) if _SETTINGS.fullmatch(name)}
    return found or {"environment": "nothing is set that changes what runs"}


def _backends(devices: list[torch.device], broken: list[str]) -> dict[str, str]:
    """What each device runs by default, and why not on the others."""
    found = {}
    for device in devices:
        default = ""
        try:
            default = backend_name(device=device)
        except Exception as error:
            broken.append(f"no backend on {device.type}: {_one_line(error)}")
        for name in BACKENDS:
            found[f"{name} on {device.type}"] = _backend(name, device, name == default, broken)
    return found


def _backend(name: str, device: torch.device, is_default: bool, broken: list[str]) -> str:
    try:
        reason = find_backend(name).why_not(torch.float16, device, ())
    except ValueError:
        return f"no: the package {name} isn't installed"
    except Exception as error:
        broken.append(f"the backend {name} can't be imported: {_one_line(error)}")
        return "broken"
    if reason:
        return f"asked for, but calls run on torch: {reason}" if is_default else f"no: {reason}"
    other = f"possible, by FASTLORA_BACKEND={name} or fastlora.use_backend"
    return "runs by default" if is_default else other


def _products(devices: list[torch.device]) -> dict[str, str]:
    """Which 16-bit products a device has."""
    words = [
        f"{name_of(dtype)} {'slow, so in float32' if is_slow(dtype) else 'fast'}"
        for dtype in HALF_DTYPES
    ]
    found = {"cpu": ", ".join(words)}
    if devices[-1].type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        found["cuda"] = f"bfloat16 {'fast' if has else 'emulated'}, float16 fast"
    return found


def _self_tests(devices: list[torch.device], broken: list[str]) -> dict[str, str]:
    """On every backend and device that covers it."""
    found: dict[str, str] = {}
    for device in devices:
        for name in BACKENDS:
            dtypes = [dtype for dtype in TOLERANCES if _covers(name, device, dtype)]
            words = [f"{name_of(d)} {_self_test(name, device, d, broken)}" for d in dtypes]
            found |= {f"{name} on {device.type}": ", ".join(words)} if words else {}
    if sys.modules.get("peft") and not why_nothing_changes():
        checks = peft_checks()
        words = [f"{what} {check.largest.relative:.1g}" for what, check in checks.items()]
        found["PEFT optimised"] = ", ".join(words)
        for what, check in checks.items():
            if not check:
                broken.append(f"self-test of fastlora.optimize, {what}: {check}")
    return found


def _covers(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        return not find_backend(name).why_not(dtype, device, ())
    except Exception:  # the section on backends tells of it
        return False


def _self_test(name: str, device: torch.device, dtype: torch.dtype, broken: list[str]) -> str:
    """The largest relative error."""
    where = f"self-test of {name} on {device.type} in {name_of(dtype)}"
    try:
        errors = relative_errors(name, device, dtype)
    except Exception as error:
        broken.append(f"{where}: {_one_line(error)}")
        return "failed"
    for what, size in errors.items():
        if not size <= TOLERANCES[dtype]:  # true for NaN
            broken.append(f"{where}: {what} is wrong, its relative error is {size:.2g}")
    return f"{max(errors.values()):.1g}"
