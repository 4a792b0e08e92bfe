"""Time and memory of a step of TRL's SFTTrainer: as it is, and with fastlora.

    pip install -e '.[recipes]'  # in a clone
    python examples/in_trl.py --out out/trl

The sides train the same packed tokens with SmolLM2 135M in bfloat16, each in its own process, and
take turns step by step:
    PEFT       TRL's defaults: PEFT's layers, and TRL's loss in chunks
    optimized  the same after fastlora.optimize(trainer.model)
    lazy       also with loss=True, and the model's own loss in place of TRL's, as in sft.py
--out gets in_trl.json.  The last line is a row of docs/trainer.md.
"""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path
from types import SimpleNamespace

from finetune import step_time_over, take_turns, to_json
from options import read_texts
from packaged import PACKAGED, prepare
from worker import Worker, run, scratch_in

SIDES = "PEFT", "optimized", "lazy"


def main(run: SimpleNamespace) -> dict:
    """One side's training, in a process of its own."""
    import peft
    from datasets import Dataset
    from memory import Growth
    from transformers import Trainer
    from transformers.trainer_callback import ProgressCallback
    from trl import SFTConfig, SFTTrainer
    from turns import Turns

    import fastlora

    class ModelsLoss(SFTTrainer):
        """With the loss that the model computes from its labels.  TRL's metrics are missing."""

        compute_loss = Trainer.compute_loss

    arguments = SFTConfig(
        str(run.scratch / run.side),
        packing=True,
        packing_strategy="bfd_split",
        max_length=run.seq_len,
        per_device_train_batch_size=run.batch,
        max_steps=run.steps,
        learning_rate=3e-4,
        model_init_kwargs={"dtype": "bfloat16"},
        bf16=False,  # the weights have 16 bits already
        gradient_checkpointing=run.checkpointing,
        use_cpu=run.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = (ModelsLoss if run.side == "lazy" else SFTTrainer)(
        run.model,
        arguments,
        train_dataset=Dataset.from_dict({"text": run.texts}),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    if run.side != "PEFT":
        fastlora.optimize(trainer.model, loss=run.side == "lazy")
        print(fastlora.coverage(trainer.model))
    trainer.remove_callback(ProgressCallback)  # the parent shows one bar for all sides
    turns = Turns(run.parent)
    trainer.add_callback(turns)
    # One forward, so that the weights are in memory before the growth is measured.
    trainer.evaluate(trainer.train_dataset.select(range(run.batch)))
    growth = Growth(run.device)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = growth.bytes()
    return {"loss": losses, "seconds_per_step": turns.seconds, "peak_memory_growth": peak}


def compare() -> None:
    parser = ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/trl"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    for name, number in {"steps": 12, "batch": 4, "seq-len": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    settings = vars(parser.parse_args()) | {"dtype": "bfloat16", "compare": True}
    settings |= {"model": str(prepare(PACKAGED["smollm2"])), "texts": read_texts(None)}
    machine = run("measuring the machine", "machine", settings)
    settings["device"] = machine["device"]
    out, results = settings["out"], dict.fromkeys(SIDES)
    with scratch_in(out) as scratch:
        sides = []
        for name in SIDES:
            print(f"\n--- {name}: loading the model", flush=True)
            sides.append(Worker(name, "in_trl", settings | {"scratch": scratch, "side": name}))
            sides[-1].answer()
        take_turns(sides, settings["steps"])
        for side in sides:
            results[side.name] = side.go()
    ratios = step_time_over("PEFT", results)
    kept = {
        name: settings[name] for name in ("steps", "batch", "seq_len", "dtype", "checkpointing")
    }
    report = {"settings": kept, **machine, "results": results, "step_time_over_peft": ratios}
    (out / "in_trl.json").write_text(to_json(report) + "\n")
    cells = [machine["machine"]["processor"]]
    for name in SIDES[1:]:
        memory = results[name]["peak_memory_growth"] / results["PEFT"]["peak_memory_growth"]
        cells.append(f"{ratios[name]['median']:.2f}, {memory:.2f}")
    print(f"\n| {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(compare())
