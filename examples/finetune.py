"""Fine-tune a language model with fastlora and, beside it, with PEFT from the same start.

    python examples/finetune.py          Gemma 3 270M on Python's documentation: 6 min on 2 cores
    python examples/finetune.py --model ./my-model --data my.jsonl --target all-linear --no-compare

This file runs each side in a process of its own, a step of each in turn, and reports; how fastlora
is used is in train_one.py.  --out gets the adapter, loss.png, loss.json and Trainer's checkpoints,
each whole or not at all.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import quantiles

from options import check_model, check_packages, parse_options, read_texts
from worker import Worker, run, start_server

GEMMA = Path(__file__).resolve().parents[1] / ".cache" / "gemma-3-270m"
TERMS = "Gemma is provided under Google's Gemma Terms of Use: ai.google.dev/gemma/terms"


def main() -> None:
    start = time.monotonic()
    options = parse_options(__doc__.partition("\n")[0])
    texts = read_texts(options.data)
    check_model(options.model)
    check_packages(options.compare, convert=options.model is None and not GEMMA.is_dir())
    # Else Intel's OpenMP would use the cores for 200 ms of the other side's turn.
    os.environ.setdefault("KMP_BLOCKTIME", "10")
    # transformers' own call of its old name, once a run.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:`is_gradient_checkpointing`:FutureWarning")
    if options.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is here: no request, and no wait for it
    start_server()
    if options.model is None:
        prepare_gemma()
    found = run("measuring the machine", "machine", vars(options))
    settings = vars(options) | {
        "model": options.model or str(GEMMA),
        "alpha": 2 * options.rank,
        "device": found["device"],
        "dtype": found["dtype_choice"]["dtype"],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".finetune-", dir=options.out) as folder:
        settings |= {"texts": texts, "scratch": Path(folder)}
        results = train(settings, options.out)
        for side, result in results.items():
            print(f"measuring the memory that {side} needs, alone", flush=True)
            result |= run(f"the memory of {side}", "memory", settings | {"side": side})
        ratios = step_time_over_peft(results)
        print_table(results, ratios)
        report = {
            "settings": told(settings),
            **found,
            "results": results,
            "step_time_over_peft": ratios,
        }
        write(report, Path(folder), options.out)
    print(f"adapter/, checkpoints/, loss.json and loss.png are in {options.out}", end=" ")
    print(f"({time.monotonic() - start:.0f} s in all)")


def prepare_gemma() -> None:
    print(TERMS)
    if not GEMMA.is_dir():
        print(f"converting the packaged Gemma 3 270M (once, about 50 s) to {GEMMA}", flush=True)
        GEMMA.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".gemma-", dir=GEMMA.parent) as scratch:
            run("converting", "packaged_gemma", {"folder": Path(scratch, "whole")})
            os.rename(Path(scratch, "whole"), GEMMA)


def train(settings: dict, out: Path) -> dict[str, dict]:
    """Train all sides, in turns; move what they leave, adapter and checkpoints, to --out."""
    names = ["fastlora", *["PEFT"] * settings["compare"], *["optimized"] * settings["optimize"]]
    results = dict.fromkeys(names)
    try:
        with ExitStack() as stack:
            sides = []
            for name in names:
                print(f"\n--- {name}: loading the model", flush=True)
                side = Worker(name, "train_one", settings | {"side": name})
                sides.append(stack.enter_context(side))
                side.answer()
            take_turns(sides, settings["steps"])
            for side in reversed(sides):  # the others leave before fastlora loads a model anew
                results[side.name] = side.go()
                side.process.join()
    finally:
        for name in names:
            keep_checkpoints(settings["scratch"] / "checkpoints" / name, out / "checkpoints" / name)
    (out / "adapter").mkdir(exist_ok=True)
    for file in (settings["scratch"] / "adapter").iterdir():
        os.replace(file, out / "adapter" / file.name)
    return results


def take_turns(sides: list[Worker], steps: int) -> None:
    """One step of each side after the other; who goes first changes with each step."""
    from tqdm import tqdm

    losses = {side.name: "" for side in sides}
    with tqdm(total=steps, desc=f"training with {' and '.join(losses)}") as bar:
        for step in range(steps):
            first = step % len(sides)
            for side in sides[first:] + sides[:first]:
                losses[side.name] = f"{side.go():.3f}"
            bar.set_postfix(losses)
            bar.update()


def step_time_over_peft(results: dict[str, dict]) -> dict[str, dict]:
    """For each other side, the ratio of each pair of steps; their median and quartiles."""
    ratios = {}
    for side in [name for name in results if name != "PEFT"] if "PEFT" in results else []:
        seconds = [results[name]["seconds_per_step"] for name in (side, "PEFT")]
        pairs = [ours / theirs for ours, theirs in zip(*seconds, strict=True)]
        low, middle, high = quantiles(pairs, method="inclusive") if pairs[1:] else 3 * pairs
        ratios[side] = {"pairs": pairs, "median": middle, "quartiles": [low, high]}
    return ratios


def keep_checkpoints(found: Path, kept: Path) -> None:
    """Put whole checkpoints (Trainer writes trainer_state.json last) in earlier ones' place."""
    whole = [path.parent for path in found.glob("checkpoint-*/trainer_state.json")]
    if whole:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
    for checkpoint in whole:
        os.replace(checkpoint, kept / checkpoint.name)


def print_table(results: dict[str, dict], step_time: dict[str, dict]) -> None:
    """The sides next to each other; a ratio is that of fastlora, or of the optimised, to PEFT."""
    rows = {  # of value and form
        "held-out loss before": (lambda side: side["held_out_loss"][0][1], "{:.3f}"),
        "held-out loss after": (lambda side: side["held_out_loss"][-1][1], "{:.3f}"),
        "peak memory growth, MiB": (lambda side: mebibytes(side["peak_memory_growth"]), "{:.0f}"),
        "kept for backward, MiB": (lambda side: mebibytes(side["kept_for_backward"]), "{:.0f}"),
    }
    head = "".join(f"{side:>12}" for side in results)
    print(f"\n{'':26}{head}" + "".join(f"{'over PEFT':>12}" for side in step_time))
    for title, (value, form) in rows.items():
        values = {side: value(result) for side, result in results.items()}
        texts = ["not known" if v is None else form.format(v) for v in values.values()]
        known = step_time if all(values.values()) else []
        ratios = "".join(f"{values[side] / values['PEFT']:12.3f}" for side in known)
        print(f"{title:26}" + "".join(f"{text:>12}" for text in texts) + ratios)
    print(
        "\npeak memory growth: of a few steps, alone; on a CPU, of the process's resident memory\n"
        "kept for backward: by one forward of a batch, without the parameters\n"
    )
    for side, result in results.items():
        print(f"{side}: {result['tokens_per_second']:.1f} tokens / s (median step)", end="")
        if ratio := step_time.get(side):
            low, high = ratio["quartiles"]
            print(f"; a step takes {ratio['median']:.3f} of PEFT's time", end=" ")
            print(
                f"(median of {len(ratio['pairs'])} pairs, quartiles {low:.3f} and {high:.3f})",
                end="",
            )
        print()


def mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def told(settings: dict) -> dict:
    """The settings for loss.json: where files lie is nobody else's business."""
    names = {name: Path(settings[name]).name for name in ("model", "data") if settings[name]}
    left_out = ("out", "scratch", "texts")
    return {name: value for name, value in settings.items() if name not in left_out} | names


def write(report: dict, scratch: Path, out: Path) -> None:
    from plot import plot

    (scratch / "loss.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(scratch / "loss.json", scratch / "loss.png")
    for name in ("loss.json", "loss.png"):
        os.replace(scratch / name, out / name)


def interrupted_once(signum: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning up
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted_once)
    signal.signal(signal.SIGTERM, interrupted_once)
    try:
        main()
    except OSError as error:  # a full disk, for one
        sys.exit(f"finetune.py: error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: nothing half-written is left", file=sys.stderr)
        sys.exit(130)
