"""The machine, the versions of packages, the folder of fastlora, and settings by environment.

Packages are imported by name, only to see whether the import works.
"""

import os
import platform
import re
import sys
from collections import Counter
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from ..version import __version__

_SETTINGS = re.compile(
    "FASTLORA(_.+)?|TRITON_.+|(OMP|MKL)_NUM_THREADS|ATEN_CPU_CAPABILITY|(ONEDNN|DNNL)_MAX_CPU_ISA"
    "|(CUDA|HIP|ROCR)_VISIBLE_DEVICES|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
)

# The Triton that PyTorch's builds for GPUs pin.
_TRITONS = {
    "2.10": "3.6", "2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9",
}  # fmt: skip
_OTHERS = ("numpy", "safetensors", "accelerate", "trl", "bitsandbytes", "torchao", "hqq", "gguf")

# The project fastlora on PyPI installs ``fastlora.py``.  In one folder with it, Python imports this
# package, because a package precedes a module; in two, the first one on ``sys.path``.
_WHAT = (
    "{} is another module of this name, such as the project fastlora on PyPI installs; `import "
    "fastlora` imports fastlora-kernels here; to remove that project: pip uninstall fastlora"
)
_CLONE = (
    "{} is a clone with the package's name: programs that start beside it import an empty fastlora "
    "(no attribute 'optimize'); rename it to fastlora-source"
)


def devices_here() -> list[torch.device]:
    """The CPU, and the first accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    others = [] if accelerator is None else [torch.device(accelerator.type, 0)]
    return [torch.device("cpu"), *others]


def hardware(devices: list[torch.device]) -> dict[str, str]:
    gpus = Counter(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    accelerators = [f"{count} x {gpu}" for gpu, count in gpus.items()]
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "system": platform.platform(),
        "processor": f"{processor_name()}, {capability}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "accelerator": ", ".join(accelerators or [d.type for d in devices[1:]]) or "none",
    }


def processor_name() -> str:
    """The processor's model on Linux; elsewhere the name that Python reports."""
    return _first("model name") or platform.processor() or platform.machine()


def processor_flags() -> list[str]:
    """The names of the processor's instructions (avx512_bf16 …) on Linux; elsewhere none."""
    return (_first("flags") or _first("Features")).split()


@cache
def _first(entry: str) -> str:
    """The first core's entry of this name in /proc/cpuinfo, or ""."""
    cpuinfo = Path("/proc/cpuinfo")  # only Linux has it
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(rf"^{entry}\s*: (.+)", text, re.M)
    return match[1] if match else ""


def versions(broken: list[str]) -> dict[str, str]:
    entries = {"fastlora": __version__, "Python": platform.python_version()}
    entries["torch"] = torch.__version__
    for name in ("triton", "transformers", "peft"):
        try:
            entries[name] = str(getattr(import_module(name), "__version__", "unknown"))
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            entries[name] = "not installed" if missing else "can't be imported"
            if not missing:
                broken.append(f"{name} is installed, but can't be imported: {one_line(error)}")
    has_gpu = torch.cuda.is_available()
    entries["triton"] += note_of_pair(entries["triton"], torch.__version__, has_gpu)
    others = {name: version_of(name) for name in _OTHERS}
    entries["others"] = ", ".join(f"{name} {number}" for name, number in others.items() if number)
    return entries


def version_of(distribution: str) -> str:
    """The version that pip lists, found without an import; "" if it isn't installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def note_of_pair(triton: str, pytorch: str, has_gpu: bool) -> str:
    """Whether PyTorch's build for GPUs comes with another Triton than the installed one."""
    minor = ".".join(pytorch.split(".")[:2])
    pinned = _TRITONS.get(minor)
    if pinned is None or not triton[0].isdigit() or triton.startswith(f"{pinned}."):
        return ""
    advice = f"pip install 'triton=={pinned}.*'" if has_gpu else "a CPU needs no Triton"
    return f": PyTorch {minor} for GPUs comes with {pinned}; {advice}"


def slow_steps(devices: list[torch.device]) -> dict[str, str]:
    """What makes steps on a GPU slow in other packages, and what to do about it."""
    notes: dict[str, str] = {}
    if devices[-1].type != "cuda":
        return notes
    if version_of("bitsandbytes"):
        notes["bitsandbytes"] = (
            "its optimizers, such as adamw_8bit, synchronize the GPU after each parameter: for "
            "adapters, adamw_torch_fused needs little more memory"
        )
    if version_of("transformers") and not find_spec("fla"):
        notes["linear attention"] = (
            "models that have it (Qwen3-Next, Qwen3.5, Kimi Linear, OLMo Hybrid) run it slowly: "
            "pip install flash-linear-attention"
        )
    if version_of("transformers") and torch.cuda.device_count() > 1:
        notes["DDP"] = (
            "for a PEFT model, Trainer searches each step for unused parameters: if all adapters "
            "are used, set ddp_find_unused_parameters=False"
        )
    return notes


def installation() -> dict[str, str]:
    package = __package__.partition(".")[0]
    found = {name: find_spec(name) for name in (package, f"{package}.kernels")}
    origins = {name: spec.origin if spec else None for name, spec in found.items()}
    places = {k: str(Path(each).parent) if each else "missing" for k, each in origins.items()}
    others = namesakes()
    return places | ({f"another {package}": others} if others else {})


def namesakes() -> str:
    """A message for each such module, and each clone with this name, on ``sys.path``; or ""."""
    here = Path(__file__).parents[1]
    paths = dict.fromkeys(Path(folder, here.name) for folder in [*sys.path, ""])
    modules = [path.with_suffix(".py") for path in paths]
    clones = [path for path in paths if (path / here.name / "__init__.py").is_file()]
    return "; ".join(
        [_WHAT.format(path) for path in modules if path.is_file()]
        + [_CLONE.format(path.absolute()) for path in clones if path != here]
    )


def settings() -> dict[str, str]:
    set_here = {name: os.environ[name] for name in sorted(os.environ) if _SETTINGS.fullmatch(name)}
    return set_here or {"environment": "no variable is set that changes what runs"}


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
