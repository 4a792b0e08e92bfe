"""One fine-tuning run with fastlora or with PEFT.  Copy from add_adapter and finish.

finetune.py runs main once for each side, in a process of its own.  One side is the frozen model
without an adapter.  ``run`` has the options; ``run.scratch`` is a folder for files.
"""

import math
import textwrap
from itertools import chain
from statistics import median
from types import SimpleNamespace

import torch
from memory import Growth, bytes_kept_for_backward, bytes_of_weights
from options import stop
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback
from turns import Turns

import fastlora

HELD_OUT_ROWS = 8  # at most, so that the curve's held-out points stay cheap
PROMPT_TOKENS, NEW_TOKENS = 24, 24  # in a sample

# The largest ‖a - b‖ / ‖a‖ of logits that rounding explains.  In bfloat16 it was 0.016 on SmolLM2
# 135M and 0.010 on Gemma 3 270M, for PEFT and for the merge.
TOLERANCE = {"bfloat16": 0.03, "float16": 0.004, "float32": 1e-4}


def main(run: SimpleNamespace) -> dict:
    tokenizer = load(AutoTokenizer, run)
    trainer = make_trainer(tokenizer, run)
    model = trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"trainable parameters: {trained:,} of {total:,} ({trained / total:.2%})", flush=True)
    result = {"trainable_parameters": trained, "weights_resident": bytes_of_weights(model)}
    result |= train(trainer, run) | {"kept_for_backward": bytes_kept_for_backward(trainer)}
    if run.side == "fastlora":
        result["resized"] = resized(trainer, run)
        result["logits"] = finish(model, tokenizer, trainer.eval_dataset[0]["input_ids"], run)
    return result


def add_adapter(model: torch.nn.Module, run: SimpleNamespace) -> torch.nn.Module:
    """Freeze the model and add an adapter.  PEFT loads fastlora's, so both start with the same.

    The frozen side gets no adapter.  Its backward runs through all layers to the embeddings.
    """
    if run.side == "frozen":
        model.requires_grad_(False).enable_input_require_grads()
        return model
    initial = run.scratch / "initial"
    if run.side == "PEFT":
        return PeftModel.from_pretrained(model, initial, is_trainable=True)
    set_seed(run.seed)
    config = LoraConfig(
        r=run.rank, lora_alpha=run.alpha, lora_dropout=run.dropout, target_modules=run.target,
        target_parameters=run.parameters,
    )  # fmt: skip
    in_8_bits = {"base": "int8", "int8_from": 0} if run.side == "int8" else {}
    try:
        model = fastlora.get_peft_model(model, config, loss=run.loss, **in_8_bits)
    except ValueError as error:
        stop(f"--target: {error}")
    print(fastlora.coverage(model))
    if run.side == "fastlora":
        model.save_pretrained(initial)
    return model


def train(trainer: Trainer, run: SimpleNamespace) -> dict:
    """Train in turns with the other sides.  Returns the losses and the times of the steps."""
    turns = Turns(run.parent)
    print("measuring the held-out loss before training", flush=True)
    losses = [(0, trainer.evaluate()["eval_loss"])]
    trainer.remove_callback(ProgressCallback)  # finetune.py shows one bar for all sides
    if not math.isfinite(losses[0][1]):  # such as Gemma 3 in float16
        stop(f"--dtype {run.dtype}: the model's loss is {losses[0][1]} before training")
    trainer.add_callback(turns)
    growth = Growth(run.device)  # after an evaluation, which read the weights from disk
    trainer.train()
    peak = growth.bytes()
    history = trainer.state.log_history
    losses += [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    return {
        "loss": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "held_out_loss": losses,
        "step_began": turns.began,
        "seconds_per_step": turns.seconds,
        "tokens_per_second": run.batch * run.seq_len / median(turns.seconds),
        "peak_memory_growth": peak,
    }


def make_trainer(tokenizer, run: SimpleNamespace) -> Trainer:
    training, held_out = make_rows(tokenizer, run)
    model = add_adapter(load_model(run), run)
    arguments = TrainingArguments(
        output_dir=str(run.scratch / "checkpoints" / run.side),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=run.batch,
        learning_rate=run.lr,
        lr_scheduler_type="constant",
        seed=run.seed,
        gradient_checkpointing=run.checkpointing,
        use_cpu=run.device == "cpu",
        logging_steps=1,
        eval_strategy="no" if run.side == "frozen" else "steps",
        eval_steps=max(4, run.steps // 4),
        save_strategy="no" if run.side == "frozen" else "steps",
        save_steps=max(1, run.steps // 2),
        dataloader_drop_last=True,
        dataloader_pin_memory=run.device != "cpu",
        label_names=["labels"],  # Trainer can't find it in a PeftModel's signature
        report_to="none",
    )
    settings = {}
    if run.side == "frozen":  # Trainer needs a parameter to optimize
        nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        settings = {"optimizers": (nothing, None)}
    return Trainer(model, arguments, train_dataset=training, eval_dataset=held_out, **settings)


def resized(trainer: Trainer, run: SimpleNamespace) -> dict:
    """The adapter's effective rank, and the held-out loss after resizing it to lower ranks."""
    model, whole = trainer.model, run.scratch / "whole"
    model.save_pretrained(whole)
    losses = {}
    for rank in [rank for rank in (8, 4, 2, 1) if rank < run.rank]:
        smaller = f"rank-{rank}"
        fastlora.resize_adapter(whole, rank=rank, output=run.scratch / smaller)
        fastlora.load_adapter(model, run.scratch / smaller, smaller)
        model.set_adapter(smaller)
        print(f"measuring the held-out loss at rank {rank}", flush=True)
        losses[rank] = trainer.evaluate()["eval_loss"]
        model.set_adapter("default")
        model.delete_adapter(smaller)
    return {"effective_rank": fastlora.resize_adapter(whole).effective_rank, "losses": losses}


def finish(model: torch.nn.Module, tokenizer, row: torch.Tensor, run: SimpleNamespace) -> dict:
    """Save the adapter, load it into a fresh base, and merge it.  Check both, and print samples."""
    adapter, prompt = run.scratch / "adapter", row[:PROMPT_TOKENS]
    trained = logits(model.eval(), row)
    model.save_pretrained(adapter)

    print(f"\nwriting two samples of {NEW_TOKENS} tokens (some seconds each)", flush=True)
    fresh = load_model(run).eval().to(model.device)
    differences = {"base": difference(trained, logits(fresh, row))}  # the adapter's effect
    print_sample("prompt", tokenizer, prompt)
    print_sample("before training", tokenizer, continuation(fresh, prompt))

    if run.compare:
        fresh = PeftModel.from_pretrained(fresh, adapter).eval()
    else:
        fresh = fastlora.load_adapter(fresh, adapter)
    differences["loaded"] = difference(trained, logits(fresh, row))
    with fastlora.merged(model):
        differences["merged"] = difference(trained, logits(model, row))
        print_sample("after training", tokenizer, continuation(model, prompt))

    # Rounding can change which expert a token goes to.
    limit = TOLERANCE[run.dtype] * (10 if run.parameters else 1)
    base, loaded, merged = (f"{each:.2g}" for each in differences.values())
    loader = "PEFT" if run.compare else "fastlora.load_adapter"
    checked = f"saved and loaded by {loader} {loaded}, merged {merged}"
    if not (differences["loaded"] <= limit and differences["merged"] <= limit):
        raise RuntimeError(
            f"relative difference to the trained model's logits: {checked}, which is more than "
            f"rounding explains ({limit}): please report it"
        )
    print(f"the adapter's files and its merge are right: {checked} (relative", end=" ")
    print("difference to the trained model's logits; rounding explains up to", end=" ")
    print(f"{limit}; without the adapter {base})", flush=True)
    return differences


@torch.no_grad()
def logits(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    return model(input_ids=row[None].to(model.device)).logits.float()


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def continuation(model: torch.nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    """The model's most likely next tokens."""
    batch = {"input_ids": prompt[None].to(model.device)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    written = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    return written[0, len(prompt) :]


def print_sample(title: str, tokenizer, tokens: torch.Tensor) -> None:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    print(f"{title}:\n{textwrap.indent(text, '    | ', lambda line: True)}\n", flush=True)


def make_rows(tokenizer, run: SimpleNamespace) -> tuple[list[dict], list[dict]]:
    """The texts as rows of seq_len tokens: rows to train on, and rows held out from the end."""
    print(f"tokenizing {sum(map(len, run.texts)):,} characters", flush=True)
    encoded = tokenizer(run.texts, add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = list(chain.from_iterable(text + end for text in encoded))
    width = run.seq_len - len(start)  # each row begins like a text in the model's pretraining
    cuts = range(0, len(tokens) - width + 1, width)
    rows = [torch.tensor(start + tokens[cut : cut + width]) for cut in cuts]
    held_out = max(1, len(rows) // 10)
    if len(rows) - held_out < run.batch:
        found = f"the data is {len(tokens):,} tokens, {len(rows)} rows of {run.seq_len}"
        needed = f"held-out rows and a batch of {run.batch} need {run.batch + held_out}"
        stop(f"{found}; {needed}: use more data, or a smaller --seq-len or --batch")
    examples = [{"input_ids": row, "labels": row} for row in rows]
    return examples[:-held_out], examples[-held_out:][:HELD_OUT_ROWS]


def load_model(run: SimpleNamespace) -> torch.nn.Module:
    if run.base == "GGUF":
        from quantized import model_of_gguf

        return model_of_gguf(run)
    model = load(AutoModelForCausalLM, run, dtype=getattr(torch, run.dtype))
    if run.base == "NF4":
        from quantized import quantize_to_nf4

        quantize_to_nf4(model)
    elif run.base.endswith("experts"):
        try:
            print(fastlora.pack(model, run.base.split()[0].lower()), flush=True)
        except ValueError as error:
            stop(f"--experts: {error}")
    return model


def load(kind: type, run: SimpleNamespace, **settings):
    """Call from_pretrained.  An error is one line."""
    try:
        return kind.from_pretrained(run.model, **settings)
    except (OSError, ValueError) as error:
        stop(f"--model {run.model} can't be loaded: {str(error).strip().splitlines()[0]}")
