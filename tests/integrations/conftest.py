"""Runs of real trainers on a tiny model.  ``make integrations`` collects a file for each trainer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
from pages import save_tiny_model
from transformers import AutoModelForCausalLM

INTEGRATION = os.environ.get("FASTLORA_INTEGRATION")
collect_ignore_glob = [] if INTEGRATION else ["test_*.py"]

SAID = "fastlora: 14 of 14 layers fast (backend torch); 2 of 2 gated MLPs as one block"
OFFLINE = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a Llama of two layers, its tokenizer, and data/rows.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    (folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct").rename(folder / "model")
    talks = [
        [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}, it is"}]
        for i in range(16)
    ]
    (folder / "data").mkdir()
    lines = [json.dumps({"messages": talk}) for talk in talks]
    (folder / "data" / "rows.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(tmp_path) -> Callable[..., str]:
    """A function that runs Python in an empty folder, and returns everything that it printed."""

    def run(*arguments: str | Path, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=os.environ | OFFLINE | environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-8000:]
        return done.stdout

    return run


@pytest.fixture
def trained(tiny) -> Callable[[Path], list[float]]:
    """A function that returns the losses of a run, and loads its adapter in PEFT.

    The folder has one trainer_state.json, beside the adapter of the last step.
    """

    def read(folder: Path) -> list[float]:
        (state,) = folder.rglob("trainer_state.json")
        base = AutoModelForCausalLM.from_pretrained(tiny / "model")
        model = peft.PeftModel.from_pretrained(base, str(state.parent))
        weights = [p for name, p in model.named_parameters() if "lora_B" in name]
        assert len(weights) == 14
        assert all(weight.any() for weight in weights)  # they begin at zero
        history = json.loads(state.read_text())["log_history"]
        return [float(entry["loss"]) for entry in history if "loss" in entry]

    return read
