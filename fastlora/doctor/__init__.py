"""``python -m fastlora doctor``: a report on this machine, on what runs here, and a self-test."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import reference
from ..backends import BACKENDS, backend_name, find_backend, use_backend
from ..backends.products import is_slow
from ..formats.format import name_of
from ..layers.linear import LoRALinear
from ..peft import untested, why_nothing_changes
from ..peft.check import Check, check
from ..projection import HALF_DTYPES
from ..text import columns
from .machine import devices_here, hardware, installation, one_line, settings, slow_steps, versions

# The largest relative error that counts as rounding: four times the dtype's epsilon.  Float32 has
# the epsilon of TF32, because a GPU may multiply float32 in TF32.
TOLERANCES = {torch.float32: 2**-8, torch.bfloat16: 2**-5, torch.float16: 2**-8}
_M, _K, _N, _R = 33, 40, 24, 4
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
_SMALL: dict[str, dict[str, Any]] = {  # settings that another version of PEFT may read differently
    "LoRA": {},
    "with dropout and rsLoRA": {"lora_dropout": 0.5, "use_rslora": True},
    "with biases": {"bias": "all", "lora_bias": True},
    "DoRA": {"use_dora": True},
}


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
        "fastlora.optimize": _optimize,
        "installation": installation,
        "settings": settings,
        "backends": lambda: _backends(devices, broken),
        "compiled kernels": lambda: _compiled(devices, broken),
        "16-bit products": lambda: _products(devices),
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


def _optimize() -> dict[str, str]:
    """Whether :func:`fastlora.optimize` supports the imported PEFT."""
    if not sys.modules.get("peft"):
        return {}
    reason = why_nothing_changes()
    return {"PEFT": f"not supported: {reason}" if reason else untested() or "supported"}


def _backends(devices: list[torch.device], broken: list[str]) -> dict[str, str]:
    """For each device and backend: whether it runs by default, or why it can't."""
    entries = {}
    for device in devices:
        default = ""
        try:
            default = backend_name(device=device)
        except Exception as error:
            broken.append(f"no backend on {device.type}: {one_line(error)}")
        for name in BACKENDS:
            entries[f"{name} on {device.type}"] = _backend(name, device, name == default, broken)
    return entries


def _backend(name: str, device: torch.device, is_default: bool, broken: list[str]) -> str:
    try:
        reason = find_backend(name).why_not(torch.float16, device, ())
    except ValueError:
        return f"no: the package {name} isn't installed"
    except Exception as error:
        broken.append(f"the backend {name} can't be imported: {one_line(error)}")
        return "broken"
    if reason:
        return f"asked for, but calls run on torch: {reason}" if is_default else f"no: {reason}"
    other = f"possible, by FASTLORA_BACKEND={name} or fastlora.use_backend"
    return "runs by default" if is_default else other


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


def _products(devices: list[torch.device]) -> dict[str, str]:
    """Whether each device multiplies 16-bit dtypes fast."""
    speed = {True: "slow, so products run in float32", False: "fast"}
    entries = {"cpu": ", ".join(f"{name_of(d)} {speed[is_slow(d)]}" for d in HALF_DTYPES)}
    if devices[-1].type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        entries["cuda"] = f"bfloat16 {'fast' if has else 'emulated'}, float16 fast"
    return entries


def _self_tests(devices: list[torch.device], broken: list[str]) -> dict[str, str]:
    """The largest relative error of each backend, device and dtype that it covers."""
    entries: dict[str, str] = {}
    for device in devices:
        for name in BACKENDS:
            dtypes: list[torch.dtype] = []
            with suppress(Exception):  # the section "backends" reports it
                why_not = find_backend(name).why_not
                dtypes = [dtype for dtype in TOLERANCES if not why_not(dtype, device, ())]
            words = [f"{name_of(d)} {_self_test(name, device, d, broken)}" for d in dtypes]
            entries |= {f"{name} on {device.type}": ", ".join(words)} if words else {}
    if sys.modules.get("peft") and not why_nothing_changes():
        checks = peft_checks()
        words = [f"{what} {check.largest.relative:.1g}" for what, check in checks.items()]
        entries["PEFT optimized"] = ", ".join(words)
        for what, check in checks.items():
            if not check:
                broken.append(f"self-test of fastlora.optimize, {what}: {check}")
    return entries


def _self_test(name: str, device: torch.device, dtype: torch.dtype, broken: list[str]) -> str:
    """The largest relative error of a small layer, as text."""
    where = f"self-test of {name} on {device.type} in {name_of(dtype)}"
    try:
        errors = relative_errors(name, device, dtype)
    except Exception as error:
        broken.append(f"{where}: {one_line(error)}")
        return "failed"
    for what, size in errors.items():
        if not size <= TOLERANCES[dtype]:  # true for NaN
            broken.append(f"{where}: {what} is wrong: its relative error is {size:.2g}")
    return f"{max(errors.values()):.1g}"


def relative_errors(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """‖ours - oracle‖ / ‖oracle‖ for the output and every gradient, by name."""
    draw: Any = {"generator": torch.Generator().manual_seed(0), **_PLAIN}
    layer = LoRALinear(_K, _N, r=_R, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, **draw))
    x, dy = (torch.randn(_M, size, **draw).to(device, dtype) for size in (_K, _N))
    leaves = [x.requires_grad_(), layer.lora_A, layer.lora_B]
    with use_backend(backend):
        y = layer(x)
        ours = [y, *torch.autograd.grad(y, leaves, dy)]
    x, lora_a, lora_b, weight, bias, dy = map(_exact, (*leaves, layer.weight, layer.bias, dy))
    y = reference.lora_linear(x, weight, lora_a, lora_b, bias=bias, scale=layer.scaling)
    truth = [y, *torch.autograd.grad(y, (x, lora_a, lora_b), dy)]
    names = ("the output", "dx", "d lora_A", "d lora_B")
    return {
        name: float((_exact(our) - true).norm().detach() / true.norm().detach())
        for name, our, true in zip(names, ours, truth, strict=True)
    }


def peft_checks() -> dict[str, Check]:
    """The results of :func:`fastlora.check` on small layers of the imported PEFT."""
    peft, checks = sys.modules["peft"], {}
    for what, fields in _SMALL.items():
        with torch.random.fork_rng([]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)
            config = peft.LoraConfig(
                r=_R, lora_alpha=5, target_modules=["0"], init_lora_weights=False, **fields
            )
            layer = torch.nn.Sequential(torch.nn.Linear(_K, _N, **_PLAIN))
            model = peft.get_peft_model(layer, config).train()
            checks[what] = check(model, torch.randn(_M, _K, requires_grad=True, **_PLAIN))
    return checks


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf with the same numbers, in float64 on the CPU, because some GPUs have no float64."""
    return tensor.detach().cpu().double().requires_grad_()
