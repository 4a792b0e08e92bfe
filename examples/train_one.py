"""One fine-tuning run, with fastlora or with PEFT.  This is the file to copy from: see ``add_adapter`` and ``finish``.

    python train_one.py RUN.json

finetune.py starts it once for each side, so that neither run's memory is part of the other's peak.  RUN.json holds the
settings; the result is written beside it, as SIDE.json.
"""

import json
import signal
import sys
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import fastlora

HELD_OUT_WINDOWS = 8  # at most; the curve's held-out points stay cheap
NEW_TOKENS = 40  # of a sample
# ‖a - b‖ / ‖a‖ of logits that are equal but for rounding.  Rounding to bfloat16 costs 2^-9 a product, and layers add up.
TOLERANCE = {"bfloat16": 0.03, "float32": 1e-4}


def main(run: SimpleNamespace) -> None:
    run.device = choose_device(run.device)
    tokenizer = load(AutoTokenizer, run)
    training, held_out = windows(tokenizer, run)
    model = add_adapter(load_model(run), run)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"trainable parameters: {trained:,} of {total:,} ({trained / total:.2%})", flush=True)
    trainer, watch = make_trainer(model, training, held_out, run)
    result = {"trainable_parameters": trained} | train(trainer, watch, run)
    if run.side == "fastlora":
        result["logits"] = finish(model, tokenizer, held_out[0]["input_ids"], run)
    (run.scratch / f"{run.side}.json").write_text(json.dumps(result))


def add_adapter(model: torch.nn.Module, run: SimpleNamespace) -> torch.nn.Module:
    """Freeze the model and give it an adapter.  PEFT loads fastlora's initial one, so both start from the same."""
    initial = run.scratch / "initial"
    if run.side == "peft":
        from peft import PeftModel

        return PeftModel.from_pretrained(model, initial, is_trainable=True)
    set_seed(run.seed)
    config = fastlora.LoRAConfig(
        r=run.rank, lora_alpha=run.alpha, lora_dropout=run.dropout, target_modules=run.target
    )
    try:
        fastlora.apply_lora(model, config)
    except ValueError as error:
        stop(f"--target: {error}")
    print(fastlora.coverage(model), flush=True)
    fastlora.save_adapter(model, initial)
    return model


def finish(model: torch.nn.Module, tokenizer, window: torch.Tensor, run: SimpleNamespace) -> dict:
    """Save the adapter, load it into a fresh base model, merge it, check both, and print what the model writes."""
    adapter = run.scratch / "adapter"
    model.eval()
    trained = logits(model, window)
    fastlora.save_adapter(model, adapter)

    print(f"writing a sample of {NEW_TOKENS} tokens, before and after", flush=True)
    fresh = load_model(run).eval().to(model.device)
    differences = {"base": difference(trained, logits(fresh, window))}  # what the adapter does
    before = sample(fresh, tokenizer, window)
    if run.compare:
        from peft import PeftModel

        fresh = PeftModel.from_pretrained(fresh, adapter).eval()
    else:
        fastlora.load_adapter(fresh, adapter)
    differences["loaded"] = difference(trained, logits(fresh, window))

    fastlora.merge_lora(model)
    differences["merged"] = difference(trained, logits(model, window))
    print(f"\nbefore training: {before}\nafter training:  {sample(model, tokenizer, window)}\n")

    loader = "PEFT" if run.compare else "fastlora.load_adapter"
    print("relative difference to the trained model's logits:")
    print(f"  base without adapter {differences['base']:.4f}; loaded by {loader}", end=" ")
    print(f"{differences['loaded']:.4f}; merged {differences['merged']:.4f}", flush=True)
    for what in ("loaded", "merged"):
        if not differences[what] <= TOLERANCE[run.dtype]:
            raise RuntimeError(
                f"the {what} model's logits differ by {differences[what]:.4f} from the trained model's, which is "
                f"more than {run.dtype} rounding explains ({TOLERANCE[run.dtype]}): please report it"
            )
    return differences


def load_model(run: SimpleNamespace) -> torch.nn.Module:
    return load(AutoModelForCausalLM, run, dtype=getattr(torch, run.dtype))


def load(kind: type, run: SimpleNamespace, **settings):
    """from_pretrained, with a one-line error."""
    try:
        return kind.from_pretrained(run.model, **settings)
    except (OSError, ValueError) as error:
        stop(f"--model {run.model} can't be loaded: {str(error).strip().splitlines()[0]}")


def windows(tokenizer, run: SimpleNamespace) -> tuple[list[dict], list[dict]]:
    """The texts as rows of seq_len tokens for training and, from the last tenth, rows that are held out."""
    texts = json.loads((run.scratch / "texts.json").read_text())
    print(f"tokenizing {sum(map(len, texts)):,} characters", flush=True)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = list(chain.from_iterable(text + end for text in encoded))
    step = run.seq_len - len(start)  # every row begins as the model was trained to see a text begin
    rows = [
        torch.tensor(start + tokens[i : i + step]) for i in range(0, len(tokens) - step + 1, step)
    ]
    held_out = max(1, len(rows) // 10)
    if len(rows) - held_out < run.batch:
        stop(
            f"the data has {len(tokens):,} tokens, {len(rows)} rows of {run.seq_len}, of which {held_out} are held out: "
            f"too few for a batch of {run.batch}. Give more data, or a smaller --seq-len or --batch"
        )
    examples = [{"input_ids": row, "labels": row} for row in rows]
    return examples[:-held_out], examples[-held_out:][:HELD_OUT_WINDOWS]


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold fastlora's adapter, where Trainer itself would write the whole model."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        fastlora.save_adapter(self.model, output_dir or self.args.output_dir)


def make_trainer(model, training, held_out, run: SimpleNamespace) -> tuple[Trainer, "StepWatch"]:
    arguments = TrainingArguments(
        output_dir=str(run.scratch / "checkpoints" / run.side),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=run.batch,
        learning_rate=run.lr,
        lr_scheduler_type="constant",
        seed=run.seed,
        use_cpu=run.device == "cpu",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=max(1, run.steps // 4),
        save_steps=max(1, run.steps // 2),
        dataloader_drop_last=True,
        dataloader_pin_memory=run.device != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],  # which Trainer can't read off a PeftModel's signature
        report_to="none",
    )
    kind, watch = (AdapterTrainer if run.side == "fastlora" else Trainer), StepWatch()
    trainer = kind(
        model,
        arguments,
        train_dataset=training,
        eval_dataset=held_out,
        callbacks=[watch, LossBar(run.side)],
    )
    trainer.remove_callback(ProgressCallback)
    return trainer, watch


def train(trainer: Trainer, watch: "StepWatch", run: SimpleNamespace) -> dict:
    """Train; return the losses and what it cost."""
    print("held-out loss before training", flush=True)
    held_out = [(0, trainer.evaluate()["eval_loss"])]
    memory = reset_peak_memory(run.device)
    trainer.train()
    peak = peak_memory_growth(run.device, memory)
    history = trainer.state.log_history
    held_out += [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if held_out[-1][0] != run.steps:
        held_out.append((run.steps, trainer.evaluate()["eval_loss"]))
    seconds = sorted(watch.seconds)[len(watch.seconds) // 2]
    return {
        "loss": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "held_out_loss": held_out,
        "seconds_per_step": watch.seconds,
        "tokens_per_second": run.batch * run.seq_len / seconds,
        "peak_memory_growth": peak,
        "kept_for_backward": bytes_kept_for_backward(trainer, run),
    }


class StepWatch(TrainerCallback):
    """The seconds of each whole step (forward, backward, optimizer), without evaluations and checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.start = self._now(args.device)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(self._now(args.device) - self.start)

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class LossBar(ProgressCallback):
    """Trainer's progress bar, with the loss in it rather than on lines of its own."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(f"training with {self.side}")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def reset_peak_memory(device: str) -> int | None:
    """Start watching; returns the bytes in use now: of the GPU, or of this process (None where that isn't known)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _process_memory("VmRSS")


def peak_memory_growth(device: str, start: int | None) -> int | None:
    """The peak since ``reset_peak_memory``, less what was in use then."""
    if start is None:
        return None
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _process_memory("VmHWM")
    return peak - start


def _process_memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def bytes_kept_for_backward(trainer: Trainer, run: SimpleNamespace) -> int:
    """What a forward of one training batch keeps until the backward, without the parameters."""
    model, device = trainer.model.train(), trainer.args.device
    rows = torch.stack([trainer.train_dataset[i]["input_ids"] for i in range(run.batch)]).to(device)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the same memory; keeping the tensor itself would be a cycle

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=rows, labels=rows).loss  # noqa: F841  it keeps the graph alive
    return sum(kept.values())


@torch.no_grad()
def logits(model: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    return model(input_ids=window[None].to(model.device)).logits.float()


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def sample(model: torch.nn.Module, tokenizer, window: torch.Tensor) -> str:
    """The beginning of a held-out text, and how the model goes on."""
    prompt = window[None, : min(16, len(window) // 2)].to(model.device)
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
    )[0]
    start, end = (
        tokenizer.decode(part, skip_special_tokens=True)
        for part in tokens.split([prompt.shape[1], len(tokens) - prompt.shape[1]])
    )
    return f"{start!r} -> {end!r}"


def choose_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        stop(
            "--device cuda: torch sees no GPU here; leave the option out, or install a torch with CUDA"
        )
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def stop(message: str) -> None:
    print(f"finetune.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def interrupted_once(signum, frame) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not stop the cleaning up
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted_once)
    settings = json.loads(Path(sys.argv[1]).read_text())
    try:
        main(SimpleNamespace(**settings | {"scratch": Path(sys.argv[1]).parent}))
    except KeyboardInterrupt:
        sys.exit(130)
