"""Fine-tune on chats with TRL's SFTTrainer: packed, with the loss on the assistant's words only.

    pip install -e '.[recipes]'  # in a clone
    python examples/sft.py --model Qwen/Qwen3-0.6B --data chats.jsonl --out out/sft [--nf4]

A line of the data has one of three forms:
    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    {"prompt": …, "completion": …}  strings or lists of messages; the loss is on the completion
    {"text": …}                     the loss is on the whole text
--out gets PEFT's adapter.  The same command resumes from the last checkpoint.  Next: sample.py.
The loss is the model's own, which fastlora computes without logits (docs/trainer.md).
"""

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path

import peft
import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer, get_training_chat_template, is_conversational

import fastlora

FORMS = ["messages"], ["prompt", "completion"], ["text"]
# ChatML.  The mask of the loss comes from {% generation %}; most models' own templates lack it.
CHATML = """
{%- if messages[0].role != 'system' %}{{ SYSTEM }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class ModelsLoss(SFTTrainer):
    """SFTTrainer with the model's loss.  The log lacks TRL's entropy and accuracy."""

    compute_loss = Trainer.compute_loss


def main() -> None:
    options = parse_options()
    rows = read_rows(options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.template:
        tokenizer.chat_template = Path(options.template).read_text()
    template = tokenizer.chat_template
    if is_conversational(rows[0]) and not template:
        sys.exit(f"{options.model} has no chat template: give a file with one by --template")
    assistant_only = "messages" in rows.column_names and not options.whole_chat
    if assistant_only:
        tokenizer.chat_template = marked(tokenizer, rows["messages"])
    held_out = None
    if options.eval:
        rows, held_out = rows.train_test_split(options.eval, seed=0).values()
    layers = options.targets
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    trainer = ModelsLoss(
        options.model,
        arguments(options, assistant_only, "bfd_split" if "text" in rows.column_names else "bfd"),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha or 2 * options.rank,
            lora_dropout=options.dropout,
            target_modules=layers if layers == "all-linear" else layers.split(","),
        ),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **nf4) if options.nf4 else None,
    )
    tokenizer.chat_template = template  # the rows are tokens now; this one is saved
    fastlora.optimize(trainer.model, loss=True)  # TRL has made the PEFT model: now, not before
    print(fastlora.coverage(trainer.model))
    checkpoint = last_checkpoint(options.out)
    if checkpoint:
        refuse_other_run(checkpoint, options)
        print(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(options.out)
    print(fastlora.coverage(trainer.model).loss)  # which loss ran
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if losses:
        after = trainer.evaluate()["eval_loss"]
        print(f"held-out loss: {losses[0]:.3f} before, {after:.3f} after")
    print(f"{trainer.state.global_step} steps; the adapter is in {options.out}")


def read_rows(file: str) -> Dataset:
    rows = load_dataset("json", data_files=file, split="train")
    if not any({*form} <= {*rows.column_names} for form in FORMS):
        forms = ", or ".join(" and ".join(form) for form in FORMS)
        sys.exit(f"{file}: a line has {', '.join(rows.column_names)}; it must have {forms}")
    return rows


def marked(tokenizer: PreTrainedTokenizerBase, chats: Iterable[list[dict]]) -> str:
    """A chat template with {% generation %} around the assistant's words, and the same text."""
    try:
        return get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:  # the model's own has none, and TRL knows no version of it that has
        pass

    def render(chat: list[dict], **settings: str) -> str:
        return tokenizer.apply_chat_template(chat, tokenize=False, **settings)

    # Some templates put a system message of their own in front.
    system = render([{"role": "user", "content": ""}]).partition("<|im_start|>user")[0]
    template = CHATML.replace("SYSTEM", json.dumps(system, ensure_ascii=False))
    if not all(render(chat) == render(chat, chat_template=template) for chat in chats):
        sys.exit(
            "The chat template doesn't mark the assistant's words, and isn't ChatML. Copy it to a "
            "file, put {% generation %} and {% endgeneration %} around the assistant's words and "
            "the end of its turn, and give the file by --template; or train on all words of the "
            "chats by --whole-chat"
        )
    print("chat template: ChatML, with {% generation %}; all chats have the same text as before")
    return template


def last_checkpoint(folder: str) -> str | None:
    """A stop during a save leaves a checkpoint without trainer_state.json, the last file."""
    whole = [f.parent.name[11:] for f in Path(folder).glob("checkpoint-*/trainer_state.json")]
    last = max((int(step) for step in whole if step.isdigit()), default=None)
    return last and f"{folder}/checkpoint-{last}"


def refuse_other_run(checkpoint: str, options: Namespace) -> None:
    """Stop if the checkpoint belongs to a run that is over, or that had another rank."""
    steps = json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"]
    if options.steps and steps >= options.steps:
        sys.exit(f"{options.out} holds a run of {steps} steps: give more --steps, or another --out")
    rank = json.loads(Path(checkpoint, "adapter_config.json").read_text())["r"]
    if rank != options.rank:
        sys.exit(f"{options.out} holds a run of rank {rank}: give --rank {rank}, or another --out")


def arguments(options: Namespace, assistant_only: bool, packing: str) -> SFTConfig:
    gpu = torch.cuda.is_available()
    return SFTConfig(
        options.out,
        packing=True,  # short rows share a sequence, and don't see each other
        packing_strategy=packing,  # rows longer than a sequence: "bfd" cuts, "bfd_split" splits
        max_length=options.max_length,
        assistant_only_loss=assistant_only,
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,  # -1: by the epochs
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        model_init_kwargs={"dtype": "bfloat16" if gpu or options.nf4 else "float32"},
        bf16=gpu,
        dataloader_pin_memory=gpu,
        gradient_checkpointing=options.checkpointing,  # try without it: fastlora saves less
        logging_steps=1,
        save_steps=options.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if options.eval else "no",
        eval_steps=options.save_steps,
        eval_on_start=bool(options.eval),
        report_to="none",
    )


def parse_options() -> Namespace:
    parser = ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a Hub id or a folder")
    parser.add_argument("--data", required=True, help="a file of JSON lines")
    parser.add_argument("--out", required=True, help="a folder of this model's own")
    parser.add_argument("--nf4", action="store_true", help="quantize the base, by bitsandbytes")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--whole-chat", action="store_true", help="the loss on all words of a chat")
    for name, default, text in [
        ("template", "", "a file with a chat template, in place of the model's"),
        ("eval", 0.0, "the share of the rows to evaluate on, such as 0.05"),
        ("rank", 16, "LoRA's r"),
        ("alpha", 0.0, "LoRA's alpha; by default twice the rank"),
        ("dropout", 0.0, "LoRA's dropout"),
        ("targets", "all-linear", "or names of layers, such as q_proj,v_proj"),
        ("lr", 2e-4, "the learning rate"),
        ("epochs", 1.0, "how often to see each row"),
        ("steps", 0, "a number of steps, in place of the epochs"),
        ("batch", 4, "sequences in a step"),
        ("max-length", 1024, "tokens in a sequence"),
        ("save-steps", 50, "steps between checkpoints, and between evaluations"),
    ]:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    return parser.parse_args()


if __name__ == "__main__":
    main()
