"""What is here, what would run, and whether it works: the text that a bug report needs.

Packages are imported to see whether they can be, by their names; nothing of theirs is used here.
"""

import os
import platform
import re
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import reference
from .backends import (
    BACKENDS,
    Settings,
    backend_name,
    find_backend,
    planned_backend,
    use_backend,
)
from .layer import LoRALinear
from .peft.optimize import why_nothing_changes
from .peft.versions import notes, why_not_dora
from .projection import Layout, unflatten
from .version import __version__

# The relative error of the self-test that is taken for rounding: four times the dtype's epsilon,
# and for float32 that of TF32, in which a GPU may multiply it.
_TOLERANCES = {torch.float32: 2**-8, torch.bfloat16: 2**-5, torch.float16: 2**-8}
_FLAGS = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
_SETTINGS = re.compile(
    "(FASTLORA|TRITON)_.+|(OMP|MKL)_NUM_THREADS|ATEN_CPU_CAPABILITY|(ONEDNN|DNNL)_MAX_CPU_ISA"
    "|(CUDA|HIP|ROCR)_VISIBLE_DEVICES|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
)


class Call(NamedTuple):
    """x [m, k] of a dtype, weight [n, k] and an adapter of rank r; on a target, else here."""

    m: int
    k: int
    n: int
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    target: str = ""  # a name in TARGETS of the Triton backend


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
            width = max(map(len, entries), default=0)
            lines += [title, *(f"  {name:{width}}  {text}" for name, text in entries.items())]
        lines += [f"BROKEN: {text}" for text in self.broken] or ["nothing is broken"]
        return "\n".join(lines)


def examine(call: Call | None = None) -> Report:
    """Look at everything; an error on the way is in ``broken``, and the rest goes on."""
    report, devices = Report(), _devices()
    for title, section in (
        ("machine", _machine),
        ("versions", lambda: _versions(report.broken)),
        ("installation", _installation),
        ("settings", _settings),
        ("backends", lambda: _backends(devices, report.broken)),
        ("16-bit products", lambda: _products(devices)),
        (_title(call, devices[-1]), lambda: call and _steps(call, devices[-1])),
        ("self-test, relative errors", lambda: _self_tests(devices, report.broken)),
    ):
        try:
            entries = section()
        except Exception as error:
            report.broken.append(f"{title}: {_named(error)}")
        else:
            report.sections |= {title: entries} if entries else {}
    return report


def _named(error: Exception) -> str:
    """One line of it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _devices() -> list[torch.device]:
    """The CPU, and the first accelerator if there is one."""
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return found if accelerator is None else [*found, torch.device(accelerator.type, 0)]


def _machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")  # only Linux has it
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = names[0] if names else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    gpus = Counter(map(_gpu, range(torch.cuda.device_count())))
    accelerator = _devices()[-1]
    return {
        "system": platform.platform(),
        "processor": f"{name}: {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, "
        f"which uses {capability}",
        "accelerator": ", ".join(f"{count} x {gpu}" for gpu, count in gpus.items())
        or ("none" if accelerator.type == "cpu" else accelerator.type),
    }


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    arch = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    arch = arch or f"sm_{properties.major}{properties.minor}"
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
                broken.append(f"{name} is installed, but can't be imported: {_named(error)}")
    if "peft" in sys.modules and found["peft"] != "can't be imported":
        found["peft"] += f": {_peft_support()}"
    return found


def _peft_support() -> str:
    reason = why_nothing_changes()
    if reason:
        return f"fastlora.optimize changes nothing: {reason}"
    return "; ".join(filter(None, ("fastlora.optimize supports it", *notes(), why_not_dora())))


def _installation() -> dict[str, str]:
    kernels = find_spec(f"{__package__}.kernels")
    places = {"fastlora": __file__, "fastlora.kernels": kernels and kernels.origin}
    return {name: str(Path(at).parent) if at else "missing" for name, at in places.items()}


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
        except ValueError as error:
            broken.append(str(error))
        for name in BACKENDS:
            found[f"{name} on {device.type}"] = _backend(name, device, name == default, broken)
    return found


def _backend(name: str, device: torch.device, is_default: bool, broken: list[str]) -> str:
    try:
        reason = find_backend(name).why_not(torch.float16, device, ())
    except ValueError as error:  # it needs a package that isn't installed
        return f"no: {str(error)}"
    except Exception as error:
        broken.append(f"the backend {name} can't be imported: {_named(error)}")
        return "broken"
    if reason:
        return f"asked for, but calls run on torch: {reason}" if is_default else f"no: {reason}"
    other = f"possible, by FASTLORA_BACKEND={name} or fastlora.use_backend"
    return "runs by default" if is_default else other


def _products(devices: list[torch.device]) -> dict[str, str]:
    """Which 16-bit products each device has."""
    fast = [_short(dtype) for dtype in _FLAGS if _is_fast(dtype)]
    slow = [_short(dtype) for dtype in _FLAGS if not _is_fast(dtype)]
    found = {"cpu": "; ".join(
        f"{', '.join(names)} {word}" for names, word in ((fast, "fast"), (slow, "slow")) if names
    )}  # fmt: skip
    if devices[-1].type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        found["cuda"] = "float16 fast; bfloat16 " + ("fast" if has else "emulated")
    return found


def _is_fast(dtype: torch.dtype) -> bool:
    """Whether torch says that oneDNN multiplies this dtype on this CPU."""
    flag = getattr(torch.ops.mkldnn, _FLAGS[dtype], None)
    return flag is not None and bool(flag())


def _title(call: Call | None, device: torch.device) -> str:
    if call is None:
        return ""
    where = call.target or device.type
    return (
        f"call on {where}: x [{call.m}, {call.k}], weight [{call.n}, {call.k}], r {call.r}, "
        f"{_short(call.dtype)}, dropout {call.dropout:g}"
    )


def _steps(call: Call, device: torch.device) -> dict[str, str]:
    """On which backend the call would run, and its launches and torch's products, in order.

    It is made on meta tensors: nothing runs.
    """
    m, k, n, r = call[:4]
    with torch.device("meta"):
        shapes = (m, k), (n, k), (r, k), (n, r)
        inputs = [torch.empty(shape, dtype=call.dtype) for shape in shapes]
        seeds = torch.empty(1, dtype=torch.int64) if call.dropout else None
    layouts, noted = (Layout(False, (1.0,)),), _Noted()
    with ExitStack() as stack:
        if call.target:
            stack.enter_context(use_backend("triton"))
        asked = backend_name(device=device)
        if asked == "triton":
            from .backends.triton import without_launching  # here, since it imports the kernels

            stack.enter_context(without_launching(noted.add_launch, call.target or device))
        name, reason = planned_backend(unflatten(inputs[1:], layouts), device)
        backend = find_backend(name)
        settings = Settings(layouts, call.dropout, backend)
        with noted:
            ys, hs = backend.forward(inputs, seeds, settings)
            forward, noted.found = noted.found, []
            backend.backward(ys, inputs, hs, (True, False, True, True), seeds, settings)
    found = {"backend": f"{name}, {f'not {asked}: {reason}' if reason else _why(call, device)}"}
    if name == "triton":
        # The weight is frozen: a product of torch's is the base's.
        in_place = [any("torch" in step for step in steps) for steps in (forward, noted.found)]
        words = ["in place" if each else "fused" for each in in_place]
        found["plan"] = f"forward {words[0]}, dx {words[1]} (docs/kernels.md)"
    for title, steps in (("forward", forward), ("backward", noted.found)):
        for i, (step, same) in enumerate(groupby(steps), 1):
            count = len(list(same))
            found[f"{title} {i}"] = step if count == 1 else f"{count} times {step}"
    return found


def _why(call: Call, device: torch.device) -> str:
    """Why the backend that was asked for was."""
    if call.target:
        return "the default there"
    if os.environ.get("FASTLORA_BACKEND"):
        return "by FASTLORA_BACKEND"
    if device.type == "cpu" and call.dtype in _FLAGS and not _is_fast(call.dtype):
        return f"the default here; products in {_short(call.dtype)} are slow"
    return "the default here"


class _Noted(TorchDispatchMode):
    """Notes launches, and torch's products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def add_launch(self, launch: Any) -> None:
        work = launch.work()
        tiles = [f"{k} {v}" for k, v in launch.arguments.items() if k.startswith("BLOCK_")]
        read, written = work.loaded / 2**20, work.stored / 2**20
        self.found.append(
            f"{launch.name}: grid {'x'.join(map(str, launch.grid))}, {', '.join(tiles)}, "
            f"{launch.warps} warps, {launch.stages} stages, {read:.1f} MiB in, {written:.1f} out"
        )

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        name = operation.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = (list(matrix.shape) for matrix in arguments[-2:])
            self.found.append(f"torch.{name}: {left} @ {right}")
        return operation(*arguments, **(named or {}))


def _self_tests(devices: list[torch.device], broken: list[str]) -> dict[str, str]:
    """A small layer on every backend and device that covers it, against the oracle."""
    found: dict[str, str] = {}
    for device in devices:
        for name in BACKENDS:
            results = [
                f"{_short(dtype)} {_self_test(name, device, dtype, broken)}"
                for dtype in _TOLERANCES
                if _covers(name, device, dtype)
            ]
            found |= {f"{name} on {device.type}": ", ".join(results)} if results else {}
    return found


def _covers(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        return not find_backend(name).why_not(dtype, device, ())
    except (ValueError, ImportError):  # which the section on backends tells of
        return False


def _self_test(name: str, device: torch.device, dtype: torch.dtype, broken: list[str]) -> str:
    """The largest relative error, which is in ``broken`` if it is no rounding."""
    where = f"the self-test of {name} on {device.type} in {_short(dtype)}"
    try:
        errors = _errors(name, device, dtype)
    except Exception as error:
        broken.append(f"{where}: {_named(error)}")
        return "failed"
    for what, error in errors.items():
        if not error <= _TOLERANCES[dtype]:  # true for NaN
            broken.append(f"{where}: {what} has the relative error {error:.2g}")
    return f"{max(errors.values()):.1g}"


def _errors(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """‖ours - oracle's‖ / ‖oracle's‖ of a layer's output and gradients."""
    draw = torch.Generator().manual_seed(0)
    layer = LoRALinear(40, 24, r=4, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    x, dy = (torch.randn(33, size, generator=draw).to(device, dtype) for size in (40, 24))
    ours = (x.requires_grad_(), layer.lora_A, layer.lora_B)
    with use_backend(name):
        y = layer(x)
        made = [y, *torch.autograd.grad(y, ours, dy)]
    assert layer.bias is not None
    exact = [t.detach().cpu().double() for t in (*ours, layer.weight, layer.bias, dy)]
    leaves, (weight, bias, dy) = [t.requires_grad_() for t in exact[:3]], exact[3:]
    y = reference.lora_linear(
        leaves[0], weight, leaves[1], leaves[2], bias=bias, scale=layer.scaling
    )
    truth = [y, *torch.autograd.grad(y, leaves, dy)]
    names = ("the output", "dx", "d lora_A", "d lora_B")
    return {
        what: float((tensor.detach().cpu().double() - true).norm() / true.norm())
        for what, tensor, true in zip(names, made, truth, strict=True)
    }
