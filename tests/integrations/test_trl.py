"""TRL's command line under ``fastlora run``, and TRL's trainer with the callback."""

import pytest
from conftest import SAID

OPTIONS = (
    "--use_peft --lora_r 4 --lora_dropout 0 --lora_target_modules all-linear --max_steps 3 "
    "--per_device_train_batch_size 2 --logging_steps 1 --output_dir out --report_to none "
    "--save_steps 3 --learning_rate 1e-2 --bf16 false --dtype float32"
)


def test_layers_are_fast_and_losses_are_trl_s(tiny, run, trained, tmp_path):
    data = ("--model_name_or_path", tiny / "model", "--dataset_name", tiny / "data")
    command = ("-m", "trl.scripts.sft", *data, *OPTIONS.split())
    assert "fastlora: " not in run(*command)
    expected = trained(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "plain")
    assert run("-m", "fastlora", "run", *command).count(SAID) == 1
    losses = trained(tmp_path / "out")
    assert len(losses) == 3
    assert losses == pytest.approx(expected, rel=1e-4)


SFT = """
import sys
from datasets import load_dataset
from fastlora.trainer import Optimize
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

model, data = sys.argv[1:]
settings = {"max_steps": 3, "report_to": "none", "logging_steps": 1, "save_steps": 3}
trainer = SFTTrainer(
    model,
    SFTConfig("out", use_cpu=True, bf16=False, learning_rate=1e-2, **settings),
    train_dataset=load_dataset(data, split="train"),
    peft_config=LoraConfig(r=4, target_modules="all-linear"),
    callbacks=[Optimize()],
)
trainer.train()
"""


def test_the_callback_in_an_sft_trainer_that_makes_the_peft_model(tiny, run, trained, tmp_path):
    (tmp_path / "sft.py").write_text(SFT)
    assert run("sft.py", tiny / "model", tiny / "data").count(SAID) == 1
    assert len(trained(tmp_path / "out")) == 3
