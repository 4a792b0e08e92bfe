"""What a cell does, in its own environment and outside of the clone: a JSON line for each check.

    python cell.py             all of them, as far as they need the interpreter or can have it
    python cell.py compiled    the kernels, as this Triton compiles them for GPUs

It needs no pytest, and nothing of the clone.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

TARGETS = ("sm_80", "sm_90", "gfx942")
PACKAGES = ("torch", "triton", "peft", "transformers", "numpy", "accelerate", "safetensors")
SETTINGS = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.2}


class SkippedError(Exception):
    """Why a check can't run here."""


def doctor() -> None:
    command = [sys.executable, "-m", "fastlora", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stdout.strip().splitlines()[-1])


def op(backend: str) -> None:
    """A layer with dropout and a bias: its output and every gradient, beside the oracle's."""
    import torch

    import fastlora
    from fastlora.backends.dropout import dropout_mask
    from fastlora.ops.door import draw_seed

    p, shapes = 0.3, ((300, 48), (40, 48), (4, 48), (40, 4), (40,))
    tensors = [torch.randn(shape).requires_grad_() for shape in shapes]
    torch.manual_seed(7)
    mask = dropout_mask(draw_seed(1, tensors[0].device), shapes[0], p)
    torch.manual_seed(7)
    x, weight, lora_a, lora_b, bias = tensors
    how = {"bias": bias, "scale": 0.5, "dropout": p}
    y = fastlora.lora_linear(x, weight, lora_a, lora_b, **how, backend=backend)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    how["bias"] = exact[4]
    truth = fastlora.reference.lora_linear(*exact[:4], **how, mask=mask)
    dy = torch.randn_like(y)
    y.backward(dy)
    truth.backward(dy.double())
    ours, theirs = [y, *(t.grad for t in tensors)], [truth, *(t.grad for t in exact)]
    torch.testing.assert_close([t.double() for t in ours], theirs, rtol=1e-4, atol=1e-4)


def compiled_by_torch() -> None:
    import torch

    import fastlora

    if not (shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")):
        raise SkippedError("no C++ compiler here")
    layer, x = fastlora.LoRALinear(24, 16, **SETTINGS | {"lora_dropout": 0.0}), torch.randn(5, 24)
    torch.nn.init.normal_(layer.lora_B)
    y = torch.compile(layer, fullgraph=True)(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x))
    assert layer.lora_A.grad is not None


def llama():
    """A tiny one; always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads)).eval()


def batch() -> dict:
    import torch

    ids = torch.arange(18).view(2, 9) % 50
    return {"input_ids": ids, "labels": ids}


def peft_model(**settings):
    """Of a Llama, with adapters that are no identity change."""
    import peft

    settings = {"target_modules": "all-linear", "init_lora_weights": False} | settings
    return peft.get_peft_model(llama(), peft.LoraConfig(**SETTINGS | settings))


def optimized() -> None:
    import fastlora

    for dora in (False, True):
        model = peft_model(use_dora=dora).train()
        report = fastlora.optimize(model)
        assert str(report).startswith("14 of 14 layers fast"), str(report)
        found = fastlora.check(model, batch())
        assert found, str(found)


def same(ours, theirs) -> None:
    import torch

    with torch.no_grad():
        logits = [model.eval()(batch()["input_ids"]).logits for model in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def files(settings: dict) -> None:
    """PEFT's to fastlora, fastlora's to PEFT, and fastlora's to itself; once more when merged."""
    import peft
    import torch

    import fastlora

    with tempfile.TemporaryDirectory() as folder:
        theirs = peft_model(**settings)
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                torch.nn.init.normal_(parameter.data)
        theirs.save_pretrained(f"{folder}/theirs")
        ours = fastlora.load_adapter(llama(), f"{folder}/theirs")
        same(ours, theirs)
        fastlora.save_adapter(ours, f"{folder}/ours")
        same(fastlora.load_adapter(llama(), f"{folder}/ours"), theirs)
        same(peft.PeftModel.from_pretrained(llama(), f"{folder}/ours"), theirs)
        same(fastlora.merge_lora(ours), theirs)


def trained(own: bool) -> None:
    """A run, and the same one from its checkpoint on."""
    from transformers import Trainer, TrainingArguments

    import fastlora
    from fastlora.trainer import AdapterTrainer

    ids, kind = batch()["input_ids"], AdapterTrainer if own else Trainer
    if own:
        settings = fastlora.LoRAConfig(target_modules="all-linear", **SETTINGS)
        model = fastlora.apply_lora(llama(), settings)
    else:
        model = peft_model()
        assert fastlora.optimize(model)
    with tempfile.TemporaryDirectory() as folder:
        how = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.02}
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        rows = [{"input_ids": row, "labels": row} for row in ids] * 4
        trainer = kind(model, TrainingArguments(folder, **how, **quiet), train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[3] < losses[0], losses
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        assert trainer.state.global_step == 4


def compiled(target: str) -> None:
    """A layer's step with this Triton, on meta tensors: every kernel gives machine code."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    import fastlora
    from fastlora.kernels import TARGETS, intercept, use_target

    to = TARGETS[target]
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget(to.kind, to.arch, to.warp_size),
            get_current_device=lambda: target,
            get_current_stream=lambda device: 0,
        )
    )
    made: dict[str, int] = {}

    def compile_it(launch) -> None:
        made[launch.name] = len(launch.compile().asm["hsaco" if to.kind == "hip" else "cubin"])

    layer = fastlora.LoRALinear(2048, 1024, **SETTINGS, device="meta", dtype=torch.bfloat16)
    x = torch.empty(4096, 2048, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with use_target(to), intercept(compile_it), fastlora.use_backend("triton"):
        layer(x).sum().backward()
    assert {"project", "weight_grad"} <= made.keys(), made
    assert all(made.values()), made


CHECKS: dict[str, Callable[[], None]] = {
    "doctor": doctor,
    "op, torch": lambda: op("torch"),
    "op, interpreter": lambda: op("triton"),
    "torch.compile": compiled_by_torch,
    "PEFT model": optimized,
    "files": lambda: files({}),
    "files, biases": lambda: files({"bias": "all", "modules_to_save": ["lm_head"]}),
    "Trainer, PEFT": lambda: trained(own=False),
    "Trainer, own": lambda: trained(own=True),
}
COMPILED = {f"kernels, {target}": lambda target=target: compiled(target) for target in TARGETS}


def outcome(check: Callable[[], None]) -> str:
    """``ok``, or what a table says instead."""
    try:
        check()
    except SkippedError as why:
        return f"skipped: {why}"
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"error: {type(error).__name__}: {lines[-1][:200]}"
    return "ok"


def main(names: list[str]) -> None:
    from fastlora.doctor.machine import processor_name

    found = {name: version(name) for name in PACKAGES}
    found = {"Python": platform.python_version()} | found
    print(json.dumps({"processor": processor_name(), "versions": found}), flush=True)
    kind = COMPILED if "compiled" in names else CHECKS
    for name in [name for name in names if name in kind] or kind:
        start = time.monotonic()
        line = {"check": name, "outcome": outcome(kind[name])}
        print(json.dumps(line | {"seconds": round(time.monotonic() - start, 1)}), flush=True)


if __name__ == "__main__":
    if "compiled" in sys.argv:  # Triton reads it when it is imported
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    os.chdir(Path(tempfile.gettempdir()))
    main(sys.argv[1:])
