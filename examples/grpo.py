"""Reinforcement learning with TRL's GRPO, sampling at the base model's speed.

    pip install -e '.[recipes]'  # in a clone
    python examples/grpo.py --model Qwen/Qwen3-0.6B

The reward here is a rule: short answers with the right sum.  Write your own in ``reward``.  Most of
a step is sampling, so MergedSampling merges the adapter into the weights meanwhile, and then
restores every bit.  --out gets PEFT's adapter, and rewards.json with loss, reward and seconds of
each step.
"""

import json
import random
from argparse import ArgumentParser, Namespace
from pathlib import Path

import peft
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import fastlora
from fastlora.trainer import MergedSampling


def reward(completions: list, total: list[int], **columns: list) -> list[float]:
    """1 for the right sum, and up to 1 for a short text.  Columns of the data come by name."""
    texts = [completion[0]["content"] for completion in completions]
    pairs = zip(texts, total, strict=True)
    return [(str(n) in text) + 1 / (1 + len(text) / 50) for text, n in pairs]


def questions(count: int) -> Dataset:
    pairs = [(random.randint(1, 99), random.randint(1, 99)) for _ in range(count)]
    chats = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in pairs]
    return Dataset.from_dict({"prompt": chats, "total": [a + b for a, b in pairs]})


def main() -> None:
    options = parse_options()
    gpu = torch.cuda.is_available()
    arguments = GRPOConfig(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.samples,
        num_generations=options.samples,  # for each prompt: GRPO compares their rewards
        max_completion_length=options.tokens,
        learning_rate=1e-5,
        model_init_kwargs={"dtype": "bfloat16" if gpu else "float32"},
        bf16=gpu,
        use_cpu=not gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    rows = questions(count=256)
    trainer = GRPOTrainer(options.model, reward, arguments, train_dataset=rows, peft_config=lora)
    fastlora.optimize(trainer.model)  # without loss=True, because TRL's loss has no logits
    print(fastlora.coverage(trainer.model))
    print(fastlora.merged(trainer.model))  # the memory that sampling will take
    trainer.add_callback(MergedSampling())
    trainer.train()
    trainer.save_model(options.out)
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    kept = [{name: step[name] for name in ("loss", "reward", "step_time")} for step in steps]
    Path(options.out, "rewards.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(f"reward {kept[0]['reward']:.3f}, then {kept[-1]['reward']:.3f}: {options.out}")


def parse_options() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a Hub id or a folder")
    parser.add_argument("--out", default="out/grpo")
    for name, number in {"steps": 100, "samples": 8, "tokens": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    return parser.parse_args()


if __name__ == "__main__":
    main()
