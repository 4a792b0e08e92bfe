"""Train eight LoRA configurations at once (ranks and learning rates), and keep the best.

    python examples/sweep.py             SmolLM2 135M on Python's documentation
    python examples/sweep.py --model ./my-model --data my.jsonl --steps 200

--out gets the table, the curves, and every adapter as PEFT's files.  After Ctrl-C, the same command
with --resume continues.  --replace deletes an earlier sweep in --out.
"""

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from options import MODEL, check_packages, folder, model, number, read_texts
from packaged import PACKAGED, prepare

RANKS, RATES = (2, 8, 32, 128), (1e-4, 5e-4)


def main() -> None:
    options = parse_options()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    packaged = PACKAGED.get(options.model)
    check_packages(packaged.needs() if packaged else [])
    texts = read_texts(options.data)
    # Imported after the checks, because the checks don't need these packages.
    import torch
    from machine import choose_dtype
    from train_one import load, load_model, make_rows
    from transformers import AutoTokenizer

    import fastlora

    if packaged:
        options.model = str(prepare(packaged))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = choose_dtype("auto", device)
    print(f"{choice['dtype']} on {device}: {choice['why']}", flush=True)
    run = Namespace(**vars(options) | {"texts": texts, "base": "dense"} | choice)
    training, held_out = make_rows(load(AutoTokenizer, run), run)
    found = fastlora.sweep(
        load_model(run).to(device),
        [
            {"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.05, "learning_rate": rate}
            for r in RANKS
            for rate in RATES
        ],
        torch.utils.data.DataLoader(training, options.batch, shuffle=True, drop_last=True),
        eval_data=torch.utils.data.DataLoader(held_out, options.batch),
        steps=options.steps,
        output_dir=options.out,
        halving=options.halving,
        warmup_steps=options.steps // 10,
        resume=options.resume,
        replace=options.replace,
        seed=options.seed,
    )
    print(found)
    draw_losses(found, options.out / "losses.png")
    best = "best/, " if found.best else ""
    print(f"{best}adapters/, sweep.json and losses.png are in {options.out}")


def draw_losses(found, picture: Path) -> None:
    """Draw the held-out losses of all trials."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for outcome in found.outcomes:
        steps, losses = zip(*outcome.losses, strict=True)
        best = outcome is found.best
        label = f"{outcome.trial.name}: {outcome.loss:.3f}"
        axes.plot(steps, losses, marker="o", markersize=3, lw=2.5 if best else 1.2, label=label)
    axes.set(xlabel="step", ylabel="held-out loss", xlim=(0, None))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def parse_options() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add, count = parser.add_argument, number(int, 1)
    add("--model", type=model, default="smollm2", help=MODEL)
    add("--data", type=Path, help='UTF-8 text, or JSONL with "text" (Python\'s documentation)')
    add("--out", type=folder, default="out/sweep", help="a folder for results (%(default)s)")
    add("--steps", type=count, default=100, help="optimizer steps (%(default)s)")
    add("--batch", type=count, default=1, help="rows per step of each trial (%(default)s)")
    add("--seq-len", type=number(int, 8), default=128, help="tokens per row (%(default)s)")
    add("--seed", type=number(int, 0), default=0, help="for adapters, data, dropout (%(default)s)")
    add("--no-halving", dest="halving", action="store_false", help="train all trials to the end")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="continue the sweep in --out")
    earlier.add_argument(
        "--replace", action="store_true", help="delete the sweep in --out, and start again"
    )
    options = parser.parse_args()
    there = any((options.out / name).exists() for name in ("state.pt", "sweep.json"))
    if there and not (options.resume or options.replace):  # before minutes of work
        parser.error(
            f"--out {options.out} has a sweep: --resume continues it, --replace deletes it"
        )
    return options


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as stop:
        sys.exit(f"\ninterrupted: {stop or 'nothing half-written is left'} (--resume)")
