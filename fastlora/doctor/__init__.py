"""``python -m fastlora doctor``: a report on this machine, on what runs here, and a self-test."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends import BACKENDS, backend_name, find_backend
from ..backends.products import is_slow
from ..formats.format import name_of
from ..peft import untested, why_nothing_changes
from ..peft.check import Check, check
from ..projection import HALF_DTYPES
from ..text import columns
from .machine import devices_here, hardware, installation, one_line, settings, slow_steps, versions


@dataclass
class Report:
    """Sections of names and texts, and a list of faults.  Prints about a screen of text."""

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


def examine() -> Report:
    """Fill all sections.  A section that fails adds to ``broken``, and the others go on."""
    report, devices = Report(), devices_here()
    broken = report.broken
    sections: dict[str, Callable[[], dict[str, str]]] = {
        "machine": lambda: hardware(devices),
        "versions": lambda: versions(broken),
        "fastlora.optimize": lambda: {"PEFT": why_nothing_changes() or untested() or "supported"},
        "installation": installation,
        "settings": settings,
        "backends": lambda: _backends(devices),
        "compiled kernels": lambda: _compiled(devices, broken),
        "16-bit products": _products,
        "slow steps": lambda: slow_steps(devices),
        "self-test, relative errors": lambda: _self_tests(devices, broken),
    }
    for title, section in sections.items():
        try:
            entries = section()
        except Exception as error:
            broken.append(f"{title}: {one_line(error)}")
        else:
            report.sections |= {title: entries} if entries else {}
    return report


def _backends(devices: list[torch.device]) -> dict[str, str]:
    """For each device and backend: whether it runs by default, or why it can't."""
    entries = {}
    for device in devices:
        default = backend_name(device=device)
        for name in BACKENDS:
            text = f"possible, by FASTLORA_BACKEND={name} or fastlora.use_backend"
            if reason := _why_not(name, device):
                asked = "asked for, but calls run on torch: " if name == default else "no: "
                text = asked + reason
            elif name == default:
                text = "runs by default"
            entries[f"{name} on {device.type}"] = text
    return entries


def _why_not(name: str, device: torch.device) -> str:
    """Why the backend doesn't run on the device; "" if it does."""
    try:
        return find_backend(name).why_not(torch.float16, device, ())
    except Exception as error:  # of a package; the section "versions" reports it
        return one_line(error)


def _compiled(devices: list[torch.device], broken: list[str]) -> dict[str, str]:
    """The environments that kernels are verified for, the tuned plans, and wrong kernels."""
    try:  # late, because it imports the kernels
        from ..backends.triton import environment, measured, read_records
    except ImportError:  # the section "backends" has the reason
        return {}
    entries = {}
    for device in devices:
        if backend_name(device=device) == "triton":
            entries[f"on {device}"] = environment(device)
            entries[f"tuned on {device}"] = measured.described(measured.name_of(device))
    faults = [(*key, fault) for key, fault in read_records().items() if fault]
    wrong = {kernel[:40]: f"wrong on {where}: {fault}" for kernel, where, fault in faults}
    if wrong:
        broken.append(
            f"{len(wrong)} compiled kernels gave wrong results: PyTorch's operations run instead"
        )
    return entries | wrong


def _products() -> dict[str, str]:
    """Whether the CPU multiplies 16-bit dtypes fast."""
    speed = {True: "slow, so products run in float32", False: "fast"}
    return {"cpu": ", ".join(f"{name_of(d)} {speed[is_slow(d)]}" for d in HALF_DTYPES)}


def _self_tests(devices: list[torch.device], broken: list[str]) -> dict[str, str]:
    """The largest difference between PEFT and fastlora in a small layer on each device."""
    if not sys.modules.get("peft") or why_nothing_changes():
        return {}
    entries = {}
    for device in devices:
        found = peft_check(device)
        entries[f"PEFT optimized on {device.type}"] = f"{found.largest.relative:.1g}"
        if not found:
            broken.append(f"self-test of fastlora.optimize on {device.type}: {found}")
    return entries


def peft_check(device: torch.device) -> Check:
    """The result of :func:`fastlora.check` on a small layer of the imported PEFT."""
    peft = sys.modules["peft"]
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=5, lora_dropout=0.5, use_rslora=True, bias="all", lora_bias=True,
        target_modules=["0"], init_lora_weights=False,
    )  # fmt: skip
    plain: Any = {"dtype": torch.float32, "device": device}
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(40, 24, **plain)), config)
    return check(model.train(), torch.randn(33, 40, requires_grad=True, **plain))
