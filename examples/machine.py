"""What this machine is, and what it is good at: the device and the dtype of a run."""

from importlib.metadata import version
from time import perf_counter
from types import SimpleNamespace

import torch
from options import stop
from torch.utils.benchmark import Timer

import fastlora
from fastlora.doctor.processor import processor_name

SLOW = 4  # × float32's time; with 16-bit products it is 0.5 to 3, without them 35 and more
ROUNDS = 20


def main(run: SimpleNamespace) -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if run.device == "cuda" and not gpu:
        stop("--device cuda: torch sees no GPU here")
    device = "cuda" if gpu and run.device != "cpu" else "cpu"
    choice = choose_dtype(run.dtype, device)
    print(f"{choice['dtype']} on {device}: {choice['why']}", flush=True)
    packages = ["torch", "transformers", *["peft"] * run.compare]
    machine = {
        "processor": processor_name(),
        "gpu": gpu if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "versions": {"fastlora": fastlora.__version__} | {name: version(name) for name in packages},
    }
    return {"device": device, "dtype_choice": {"asked": run.dtype} | choice, "machine": machine}


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
    why += f"; above {SLOW} x, float32 is chosen"
    return {"dtype": dtype, "why": why, "bfloat16_over_float32": ratio}


def bfloat16_over_float32() -> float:
    """Best times of dy @ W, the product that a CPU without 16-bit products is slowest at.

    It takes some hundredths of a second, on one thread: a busy machine would let a second one wait.
    """
    dy, w = torch.randn(64, 128), torch.randn(128, 128)
    timers = []
    for dtype in (torch.bfloat16, torch.float32):
        product = {"dy": dy.to(dtype), "w": w.to(dtype)}
        timers.append(Timer("dy @ w", globals=product, timer=perf_counter))  # on one thread
    rounds = [[timer.timeit(1).median for timer in timers] for _ in range(ROUNDS)]
    bfloat16, float32 = map(min, zip(*rounds, strict=True))
    return bfloat16 / float32
