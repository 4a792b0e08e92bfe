"""Three steps of a tiny model in real trainers: layers are fast, and losses don't change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from pages import save_tiny_model
from transformers import AutoModelForCausalLM

SAID = "14 of 14 layers fast (backend torch); 2 of 2 gated MLPs as one block"
OFFLINE = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
OFFLINE |= {"AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
STEPS = "--max_steps 3 --per_device_train_batch_size 2 --logging_steps 1 --learning_rate 1e-2 "
STEPS += "--lora_dropout 0 --report_to none --output_dir out"
TRL = f"-m trl.scripts.sft --model_name_or_path model --dataset_name data --use_peft --lora_r 4 \
--lora_target_modules all-linear --save_steps 3 --bf16 false --dtype float32 {STEPS}"
SWIFT = f"-m swift.cli.sft --model model --dataset data/rows.jsonl --model_type llama --template \
dummy --tuner_type lora --lora_rank 4 --target_modules all-linear --torch_dtype float32 --use_hf \
true --add_version false {STEPS}"
AXOLOTL: dict = {"base_model": "model", "adapter": "lora", "lora_r": 4, "lora_alpha": 8}
AXOLOTL |= {"lora_dropout": 0.0, "lora_target_linear": True, "chat_template": "chatml"}
AXOLOTL |= {"output_dir": "out", "dataset_prepared_path": "prepared", "sequence_len": 64, "seed": 3}
AXOLOTL |= {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 3, "bf16": False}
AXOLOTL |= {"save_steps": 3, "learning_rate": 0.01, "optimizer": "adamw_torch", "logging_steps": 1}
AXOLOTL |= {"lr_scheduler": "constant", "special_tokens": {"pad_token": "<|im_end|>"}}
AXOLOTL["lora_model_dir"] = "adapter"
AXOLOTL["datasets"] = [{"path": "data/rows.jsonl", "ds_type": "json", "type": "chat_template"}]
FACTORY: dict = {"model_name_or_path": "model", "stage": "sft", "do_train": True, "dataset": "rows"}
FACTORY |= {"dataset_dir": ".", "template": "chatml", "finetuning_type": "lora", "lora_rank": 4}
FACTORY |= {"lora_target": "all", "output_dir": "out", "max_steps": 3, "logging_steps": 1}
FACTORY |= {"per_device_train_batch_size": 2, "learning_rate": 0.01, "report_to": "none"}
ROLES = {f"{tag}_tag": tag for tag in ("role", "content", "user", "assistant")}
ROWS = {"file_name": "data/rows.jsonl", "formatting": "sharegpt", "tags": ROLES}
ROWS["columns"] = {"messages": "messages"}
PLUGIN = {"plugins": ["fastlora.integrations.axolotl.FastLoRAPlugin"]}
OFF = dict.fromkeys([f"lora_{name}_kernel" for name in ("mlp", "qkv", "o", "embedding")], False)
COMMANDS = {"trl": TRL, "swift": SWIFT, "axolotl": "-m axolotl.cli.train plain.yml"}
COMMANDS |= {"llamafactory": "-m llamafactory.cli train factory.yml"}
PLUGINS = {"swift": f"{SWIFT} --external_plugins {{}} --callbacks fastlora"}
PLUGINS |= {"axolotl": "-m axolotl.cli.train plugin.yml", "trl": "sft.py"}
SFT = """
from datasets import load_dataset
from fastlora.trainer import Optimize
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
settings = {"max_steps": 3, "report_to": "none", "logging_steps": 1, "save_steps": 3, "bf16": False}
settings |= {"learning_rate": 1e-2, "per_device_train_batch_size": 2}
SFTTrainer("model", SFTConfig("out", **settings), train_dataset=load_dataset("data", split="train"),
    peft_config=LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[Optimize()]).train()
"""
VERL = """
from types import SimpleNamespace as Record
import verl
from transformers import AutoModelForCausalLM
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine
config = Record(lora_adapter_path=None, lora_rank=4, lora_alpha=8, target_modules="all-linear",
    target_parameters=None, exclude_modules=None, use_shm=False)
base = AutoModelForCausalLM.from_pretrained("model")
FSDPEngine._build_lora_module(Record(model_config=config), base)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a Llama of two layers, its tokenizer, talks, and the configs."""
    save_tiny_model(tmp_path)
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").rename(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(CHATML)
    # axolotl seeds nothing before it makes an adapter, so it gets one.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "data").mkdir()
    talks = [[("user", f"Say {i}"), ("assistant", f"{i}, it is")] for i in range(16)]
    with (tmp_path / "data" / "rows.jsonl").open("w") as file:
        for talk in talks:
            words = [{"role": role, "content": content} for role, content in talk]
            print(json.dumps({"messages": words}), file=file)
    (tmp_path / "plain.yml").write_text(json.dumps(AXOLOTL | OFF))
    (tmp_path / "plugin.yml").write_text(json.dumps(AXOLOTL | PLUGIN))
    (tmp_path / "wrong.yml").write_text(json.dumps(AXOLOTL | PLUGIN | {"fastlora_gated_mlps": "x"}))
    (tmp_path / "factory.yml").write_text(json.dumps(FACTORY))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": ROWS}))
    (tmp_path / "sft.py").write_text(SFT)
    (tmp_path / "verl_model.py").write_text(VERL)
    return tmp_path


def ran(command: str, folder: Path, status: int = 0, **environment: str) -> str:
    """Everything that Python printed in the folder."""
    own = os.environ | OFFLINE | environment
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([sys.executable, *command.split()], cwd=folder, env=own, **both)
    assert done.returncode == status, done.stdout[-8000:]
    return done.stdout


def losses(folder: Path) -> list[float]:
    """The losses of the run.  Its adapter is loaded in PEFT."""
    *_, state = sorted((folder / "out").rglob("trainer_state.json"))
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = peft.PeftModel.from_pretrained(base, str(state.parent))
    trained = [p.any() for name, p in model.named_parameters() if "lora_B" in name]  # from zero
    assert len(trained) == 14
    assert all(trained)
    history = json.loads(state.read_text())["log_history"]
    return [float(entry["loss"]) for entry in history if "loss" in entry]


@pytest.mark.parametrize("trainer", COMMANDS)
def test_layers_are_fast_and_losses_are_the_trainer_s(trainer, folder):
    assert "layers fast" not in ran(COMMANDS[trainer], folder)
    expected = losses(folder)
    assert len(expected) == 3
    ways = [f"-m fastlora run {COMMANDS[trainer]}", PLUGINS.get(trainer, "")]
    if "{}" in ways[1]:
        ways[1] = ways[1].format(ran("-m fastlora path swift", folder).split()[-1])
    for number, way in enumerate(filter(None, ways)):
        (folder / "out").rename(folder / f"before{number}")
        assert ran(way, folder).count(SAID) == 1
        assert losses(folder) == pytest.approx(expected, rel=1e-3)


def test_axolotl_checks_the_plugin_s_keys(folder):
    assert "fastlora_gated_mlps" in ran("-m axolotl.cli.train wrong.yml", folder, status=1)


@pytest.mark.parametrize("value", ["0", "1"])
def test_axolotl_s_entry_point_acts_with_the_variable(value, folder):
    assert ran(COMMANDS["axolotl"], folder, FASTLORA=value).count(SAID) == int(value)


@pytest.mark.parametrize("value", ["0", "1"])
def test_verl_s_engine_makes_fast_layers_with_the_variable(value, folder):
    assert ran("verl_model.py", folder, FASTLORA=value).count(SAID) == int(value)
