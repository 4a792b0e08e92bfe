"""What this machine is, and what it is good at: the device and the dtype of a run."""

import platform
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from options import stop

import fastlora

SLOW = 4  # × float32's time; with 16-bit products it is 0.5 to 3, without them 35 and more
ROUNDS = 20


def main(run: SimpleNamespace) -> dict:
    device = choose_device(run.device)
    choice = choose_dtype(run.dtype, device)
    print(f"{choice['dtype']} on {device}: {choice['why']}", flush=True)
    return {
        "device": device,
        "dtype_choice": {"asked": run.dtype} | choice,
        "machine": describe(device, run.compare),
    }


def choose_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: torch sees no GPU here")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(name: str, device: str) -> dict:
    """The dtype, why, and on a CPU the time of a bfloat16 product over that of a float32 one."""
    if name != "auto":
        return {"dtype": name, "why": "by --dtype"}
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return {"dtype": "bfloat16", "why": "this GPU has it"}
        return {"dtype": "float32", "why": "this GPU has no bfloat16, and float16 can overflow"}
    ratio = bfloat16_over_float32()
    dtype = "float32" if ratio > SLOW else "bfloat16"
    why = f"a small bfloat16 product takes {ratio:.1f} x the time of a float32 one on this CPU"
    limit = f"above {SLOW} x, float32 is chosen"
    return {"dtype": dtype, "why": f"{why}; {limit}", "bfloat16_over_float32": ratio}


def bfloat16_over_float32() -> float:
    """Best times of dy @ W, the product that a CPU without 16-bit products is slowest at.

    It takes a few milliseconds, on one thread: a busy machine would let a second one wait.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dy, w = torch.randn(64, 128), torch.randn(128, 128)
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for warm in [False] + [True] * ROUNDS:
        for dtype in best:
            left, right = dy.to(dtype), w.to(dtype)
            start = time.perf_counter()
            left @ right
            if warm:
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return best[torch.bfloat16] / best[torch.float32]


def describe(device: str, compare: bool) -> dict:
    """What a reader of the results must know of this machine."""
    packages = ["torch", "transformers", *["peft"] * compare]
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "versions": {"fastlora": fastlora.__version__} | {name: version(name) for name in packages},
    }


def processor() -> str:
    """The name of the CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
