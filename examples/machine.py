"""Facts about this machine, and the device and dtype of a run by them."""

from importlib.metadata import version
from types import SimpleNamespace

import torch
from options import stop

import fastlora
from fastlora.backends.products import is_slow
from fastlora.doctor.machine import processor_name


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
    """The dtype, and the reason for it."""
    if name != "auto":
        return {"dtype": name, "why": "by --dtype"}
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return {"dtype": "bfloat16", "why": "this GPU has it"}
        return {"dtype": "float32", "why": "this GPU has no bfloat16, and float16 can overflow"}
    if is_slow(torch.bfloat16):
        return {"dtype": "float32", "why": "torch multiplies bfloat16 slowly on this CPU"}
    return {"dtype": "bfloat16", "why": "torch multiplies it fast on this CPU"}
