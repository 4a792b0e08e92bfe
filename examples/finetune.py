"""Fine-tune a language model with fastlora, then with PEFT from the same start, and compare.

    python examples/finetune.py          Gemma 3 270M on Python's documentation: 5 min on 2 cores
    python examples/finetune.py --model ./my-model --data my.jsonl --target all-linear --no-compare

This file runs each side in a process of its own, and reports; how fastlora is used is in
train_one.py.  --out gets the adapter, loss.png, loss.json and Trainer's checkpoints, each whole or
not at all.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from options import check_model, check_packages, parse_options, read_texts

HERE = Path(__file__).resolve().parent
GEMMA = HERE.parent / ".cache" / "gemma-3-270m"
TERMS = "Gemma is provided under Google's Gemma Terms of Use: ai.google.dev/gemma/terms"


def main() -> None:
    start = time.monotonic()
    options = parse_options(__doc__.partition("\n")[0])
    texts = read_texts(options.data)
    check_model(options.model)
    check_packages(options.compare, convert=options.model is None and not GEMMA.is_dir())
    environment = dict(os.environ)
    if options.model is None:
        environment.setdefault("HF_HUB_OFFLINE", "1")  # all is here: no request, and no wait for it
        prepare_gemma(environment)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".finetune-", dir=options.out) as folder:
        scratch = Path(folder)
        (scratch / "texts.json").write_text(json.dumps(texts))
        sides = ["fastlora", *["PEFT"] * options.compare, *["optimized"] * options.optimize]
        results = {side: run_side(side, options, scratch, environment) for side in sides}
        print_table(results)
        settings = settings_of(options) | {"model": Path(options.model or GEMMA).name}
        del settings["out"]  # where files lie is nobody else's business
        report = {"settings": settings, "results": results}
        (scratch / "loss.json").write_text(json.dumps(report, indent=2) + "\n")
        title = f"LoRA fine-tuning of {Path(options.model or GEMMA).name}, r = {options.rank}"
        plot(results, title, scratch / "loss.png")
        for name in ("loss.json", "loss.png"):
            os.replace(scratch / name, options.out / name)
    print(f"adapter/, checkpoints/, loss.json and loss.png are in {options.out}", end=" ")
    print(f"({time.monotonic() - start:.0f} s in all)")


def prepare_gemma(environment: dict[str, str]) -> None:
    print(TERMS)
    if not GEMMA.is_dir():
        print(f"converting the packaged Gemma 3 270M (once, about 50 s) to {GEMMA}", flush=True)
        GEMMA.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".gemma-", dir=GEMMA.parent) as scratch:
            run_python(HERE / "packaged_gemma.py", Path(scratch, "whole"), environment)
            os.rename(Path(scratch, "whole"), GEMMA)


def settings_of(options: argparse.Namespace) -> dict:
    settings = vars(options) | {"model": options.model or GEMMA, "alpha": 2 * options.rank}
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }


def run_side(side: str, options: argparse.Namespace, scratch: Path, environment: dict) -> dict:
    """Train one side in its own process; move what it leaves, adapter and checkpoints, to --out."""
    print(f"\n--- {side}: loading torch and the model", flush=True)
    run_file = scratch / "run.json"
    run_file.write_text(json.dumps(settings_of(options) | {"side": side}))
    try:
        run_python(HERE / "train_one.py", run_file, environment)
    finally:
        keep_checkpoints(scratch / "checkpoints" / side, options.out / "checkpoints" / side)
    if side == "fastlora":
        (options.out / "adapter").mkdir(exist_ok=True)
        for file in (scratch / "adapter").iterdir():
            os.replace(file, options.out / "adapter" / file.name)
    return json.loads((scratch / f"{side}.json").read_text())


def run_python(script: Path, argument: Path, environment: dict[str, str]) -> None:
    """Run a script that prints its own errors, and leave with its code if it fails.

    It doesn't see Ctrl-C: this process does, ends it, and removes what it wrote.
    """
    process = subprocess.Popen(
        [sys.executable, str(script), str(argument)],
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    if code:
        sys.exit(code if code > 0 else 1)


def keep_checkpoints(found: Path, kept: Path) -> None:
    """Put whole checkpoints (Trainer writes trainer_state.json last) in earlier ones' place."""
    whole = [path.parent for path in found.glob("checkpoint-*/trainer_state.json")]
    if whole:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
    for checkpoint in whole:
        os.replace(checkpoint, kept / checkpoint.name)


def print_table(results: dict[str, dict]) -> None:
    """The sides next to each other; a ratio is that of fastlora, or of the optimised, to PEFT."""
    rows = [
        ("held-out loss before", lambda side: side["held_out_loss"][0][1], "{:.3f}"),
        ("held-out loss after", lambda side: side["held_out_loss"][-1][1], "{:.3f}"),
        ("tokens / s (median step)", lambda side: side["tokens_per_second"], "{:.1f}"),
        ("peak memory growth, MiB", lambda side: mebibytes(side["peak_memory_growth"]), "{:.0f}"),
        ("kept for backward, MiB", lambda side: mebibytes(side["kept_for_backward"]), "{:.0f}"),
    ]
    others = [side for side in results if side != "PEFT"] if "PEFT" in results else []
    head = "".join(f"{side:>12}" for side in results)
    print(f"\n{'':26}{head}" + "".join(f"{'over PEFT':>12}" for side in others))
    for title, value, form in rows:
        values = {side: value(result) for side, result in results.items()}
        texts = ["not known" if v is None else form.format(v) for v in values.values()]
        known = others if all(values.values()) else []
        ratios = "".join(f"{values[side] / values['PEFT']:12.3f}" for side in known)
        print(f"{title:26}" + "".join(f"{text:>12}" for text in texts) + ratios)
    print(
        "\npeak memory growth: over the whole training; on a CPU, of the process's resident memory"
    )
    print("kept for backward: by one forward of a batch, without the parameters\n")
    for side, result in results.items():
        seconds = sorted(result["seconds_per_step"])
        quick, slow = seconds[len(seconds) // 4], seconds[3 * len(seconds) // 4]
        if slow > 1.2 * quick:
            print(
                f"The speeds are doubtful: a quarter of {side}'s steps took below {quick:.3g} s, a "
                f"quarter above {slow:.3g} s. Does something else use this machine?\n"
            )


def mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def plot(results: dict[str, dict], title: str, path: Path) -> None:
    """Training losses as lines, held-out losses as points; all sides show where they agree."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for (side, result), (color, line, marker) in zip(
        results.items(), [("C0", "-", "o"), ("C1", "--", "x"), ("C2", ":", "+")], strict=False
    ):
        speed = f"{result['tokens_per_second']:.0f} tokens/s"
        steps, losses = zip(*result["loss"], strict=True)
        axes.plot(steps, losses, line, color=color, label=f"{side}, training batch ({speed})")
        steps, losses = zip(*result["held_out_loss"], strict=True)
        axes.plot(steps, losses, marker, color=color, markersize=9, markeredgewidth=2,
                  fillstyle="none", label=f"{side}, held out")  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats per token)", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def interrupted_once(signum: int, frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning up
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted_once)
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: nothing half-written is left", file=sys.stderr)
        sys.exit(130)
