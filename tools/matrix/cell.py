"""The checks of a cell, run in its environment and outside of the clone: a JSON line for each.

    python cell.py [NAME …]    all checks, or these; kernels run in Triton's interpreter
    python cell.py compiled    the kernels, compiled for GPUs by this Triton

It needs no pytest, nothing of the clone, and no Triton, which macOS and Windows don't have.  The
exit status shows the worst check.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
os.environ.update({} if "compiled" in sys.argv else {"TRITON_INTERPRET": "1"})

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastlora
from fastlora.backends.dropout import dropout_mask
from fastlora.doctor.machine import processor_name, version_of
from fastlora.ops.node import draw_seed
from fastlora.peft import why_no_injection

PACKAGES = ("torch", "triton", "peft", "transformers", "numpy", "accelerate", "safetensors", "trl")
SETTINGS = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.2}
BATCH = {"input_ids": torch.arange(18).view(2, 9), "labels": torch.arange(18).view(2, 9)}


class SkippedError(Exception):
    """The reason why a check can't run here."""


def doctor() -> None:
    """The doctor command, without the interpreter."""
    compiling = {key: own for key, own in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastlora", "doctor"]
    done = subprocess.run(command, env=compiling, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout


def op(backend: str) -> None:
    """A layer with dropout and a bias: its output and every gradient equal the oracle's."""
    new = tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4)
    if backend == "triton" and not version_of("triton"):
        raise SkippedError("no Triton here")
    if backend == "triton" and version_of("triton").startswith("3.6.") and new:
        raise SkippedError("Triton 3.6's interpreter needs NumPy before 2.4")
    p, shapes = 0.3, ((300, 48), (40, 48), (4, 48), (40, 4), (40,))
    tensors = [torch.randn(shape).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    torch.manual_seed(7)
    mask = dropout_mask(draw_seed(1, tensors[0].device), shapes[0], p)
    torch.manual_seed(7)
    how = {"scale": 0.5, "dropout": p}
    y = fastlora.lora_linear(*tensors[:4], bias=tensors[4], **how, backend=backend)
    truth = fastlora.reference.lora_linear(*exact[:4], bias=exact[4], **how, mask=mask)
    dy = torch.randn_like(y)
    y.backward(dy)
    truth.backward(dy.double())
    ours, theirs = [y, *(t.grad for t in tensors)], [truth, *(t.grad for t in exact)]
    torch.testing.assert_close([t.double() for t in ours], theirs, rtol=1e-4, atol=1e-4)


def compiled_by_torch() -> None:
    if not (shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")):
        raise SkippedError("no C++ compiler here")
    layer, x = fastlora.LoRALinear(24, 16, **SETTINGS | {"lora_dropout": 0.0}), torch.randn(5, 24)
    torch.nn.init.normal_(layer.lora_B)
    y = torch.compile(layer, fullgraph=True)(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x))
    assert layer.lora_A.grad is not None


def llama() -> torch.nn.Module:
    """A tiny Llama, always with the same weights."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads)).eval()


def peft_model(**settings) -> torch.nn.Module:
    """A PEFT model of the Llama, whose adapters change the outputs."""
    settings = {"target_modules": "all-linear", "init_lora_weights": False} | settings
    return peft.get_peft_model(llama(), peft.LoraConfig(**SETTINGS | settings))


def optimized() -> None:
    for dora in (False, True):
        model = peft_model(use_dora=dora).train()
        assert str(fastlora.coverage(fastlora.optimize(model))).startswith("14 of 14 layers fast")
        found = fastlora.check(model, BATCH)
        assert found, str(found)


def same(*models: torch.nn.Module) -> None:
    with torch.no_grad():
        logits = [model.eval()(BATCH["input_ids"]).logits for model in models]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def files(**settings) -> None:
    """PEFT's files in fastlora, and merged."""
    if reason := why_no_injection():
        raise SkippedError(reason)
    with tempfile.TemporaryDirectory() as folder:
        theirs = peft_model(**settings)
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                torch.nn.init.normal_(parameter.data)
        theirs.save_pretrained(f"{folder}/theirs")
        ours = fastlora.load_adapter(llama(), f"{folder}/theirs")
        same(ours, theirs)
        same(ours.merge_and_unload(), theirs)


def trained(kind: Callable, config: type = TrainingArguments, table: Callable = list) -> None:
    """A run, and the same run resumed from its checkpoint."""
    model = fastlora.optimize(peft_model())
    with tempfile.TemporaryDirectory() as folder:
        how = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.02}
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        rows = table([{"input_ids": row, "labels": row} for row in BATCH["input_ids"].tolist()] * 4)
        trainer = kind(model, config(folder, **how, **quiet), train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[3] < losses[0], losses
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        assert trainer.state.global_step == 4


def trained_by_trl() -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"</s>": 0}))
    special = {"eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    trained(partial(SFTTrainer, processing_class=tokenizer), SFTConfig, Dataset.from_list)


def compiled(name: str) -> None:
    """A layer's step with this Triton, on meta tensors: every kernel compiles to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fastlora.kernels.launch import intercept
    from fastlora.kernels.target import TARGETS, use_target

    target, made = TARGETS[name], {}
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget(target.kind, target.arch, target.warp_size),
        get_current_device=lambda: name,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)

    def compile_it(launch) -> None:
        made[launch.name] = launch.compile().asm["hsaco" if target.kind == "hip" else "cubin"]

    layer = fastlora.LoRALinear(2048, 1024, **SETTINGS, device="meta", dtype=torch.bfloat16)
    x = torch.empty(4096, 2048, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with use_target(target), intercept(compile_it), fastlora.use_backend("triton"):
        layer(x).sum().backward()
    assert {"project", "weight_grad"} <= {kernel for kernel, code in made.items() if code}


CHECKS: dict[str, Callable[[], None]] = {
    "doctor": doctor,
    "op, torch": lambda: op("torch"),
    "op, interpreter": lambda: op("triton"),
    "torch.compile": compiled_by_torch,
    "PEFT model": optimized,
    "files": files,
    "files, biases": lambda: files(bias="all", modules_to_save=["lm_head"]),
    "Trainer, PEFT": lambda: trained(Trainer),
}
if version_of("trl"):
    CHECKS["Trainer, TRL"] = trained_by_trl
if "compiled" in sys.argv:
    targets = ("sm_80", "sm_90", "gfx942")
    CHECKS = {f"kernels, {name}": lambda name=name: compiled(name) for name in targets}


def outcome(check: Callable[[], None]) -> str:
    """``ok``, or the table's text for the failure or skip."""
    try:
        check()
    except SkippedError as why:
        return f"skipped: {why}"
    except Exception as error:
        *_, last = ["", *str(error).strip().splitlines()]
        return f"error: {type(error).__name__}: {last[:200]}"
    return "ok"


if __name__ == "__main__":
    chosen = [name for name in CHECKS if name in sys.argv] or [*CHECKS]
    found = {name: version_of(name) or "–" for name in PACKAGES}
    found = {"Python": platform.python_version(), **found}
    head = {"checks": chosen, "processor": processor_name(), "versions": found}
    print(json.dumps(head), flush=True)
    failed = False
    for name in chosen:
        said = outcome(CHECKS[name])
        failed |= said.startswith("error")
        print(json.dumps({"check": name, "outcome": said}), flush=True)
    sys.exit(failed)
