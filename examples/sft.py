"""Fine-tune on chats with TRL's SFTTrainer: packed, with the loss on the assistant's words alone.

    pip install 'fastlora-kernels[recipes]'
    python sft.py --model Qwen/Qwen3-0.6B --data chats.jsonl --out out/sft [--nf4]

A line of the data is {"messages": [{"role": "user", "content": …}, {"role": "assistant", …}, …]}.
The chat template marks the assistant's words ({% generation %}), or TRL has one that does.  --out
gets PEFT's adapter; started again, it goes on from the last checkpoint.  Then comes sample.py.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import peft
import torch
from datasets import load_dataset
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import fastlora


def main() -> None:
    options = parse_options()
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    trainer = SFTTrainer(
        options.model,
        arguments(options),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **nf4) if options.nf4 else None,
    )
    print(fastlora.optimize(trainer.model))  # TRL has made the PEFT model: now, not before
    trainer.train(resume_from_checkpoint=last_checkpoint(options.out))
    trainer.save_model(options.out)
    print(f"{trainer.state.global_step} steps; the adapter is in {options.out}")


def last_checkpoint(folder: str) -> str | None:
    """A stop while it was written leaves one without the file that comes last."""
    whole = [f.parent.name[11:] for f in Path(folder).glob("checkpoint-*/trainer_state.json")]
    last = max((int(step) for step in whole if step.isdigit()), default=None)
    return last and f"{folder}/checkpoint-{last}"


def arguments(options: Namespace) -> SFTConfig:
    gpu = torch.cuda.is_available()
    return SFTConfig(
        options.out,
        packing=True,  # short chats share a row, and don't see each other
        max_length=options.max_length,
        assistant_only_loss=True,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        model_init_kwargs={"dtype": "bfloat16" if gpu or options.nf4 else "float32"},
        bf16=gpu,
        gradient_checkpointing=options.checkpointing,  # try without it: fastlora keeps less
        logging_steps=1,
        save_steps=options.save_steps,
        save_total_limit=2,
        report_to="none",
    )


def parse_options() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a Hub id or a folder")
    parser.add_argument("--data", required=True, help="a file of JSON lines")
    parser.add_argument("--nf4", action="store_true", help="quantize the base, by bitsandbytes")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--out", required=True, help="a folder of this model's own")
    for name, number in {"steps": 100, "batch": 4, "max-length": 1024, "save-steps": 50}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    return parser.parse_args()


if __name__ == "__main__":
    main()
