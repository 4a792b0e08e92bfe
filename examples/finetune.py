"""Fine-tune a language model with fastlora, and with PEFT from the same start to compare.

    python examples/finetune.py      SmolLM2 135M on Python's documentation: 3 min on 2 cores
    python examples/finetune.py --quick          the same table in 2 min
    python examples/finetune.py --steps 40       the same for longer
    python examples/finetune.py --experts        a small mixture of experts, dense and packed
    python examples/finetune.py --quantized      over NF4 and over GGUF's blocks, and dense
    python examples/finetune.py --int8           also over a base in 8 bits
    python examples/finetune.py --model gemma    Gemma 3 270M, under the Gemma Terms of Use
    python examples/finetune.py --model ./my-model --data my.jsonl --target all-linear --no-compare

Each side (fastlora, PEFT …) runs in its own process, and the sides take turns step by step.
train_one.py shows how to use fastlora.  --out gets the adapter, loss.png, loss.json and Trainer's
checkpoints, each complete or not at all.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from statistics import quantiles

from options import check_packages, parse_options, read_texts
from packaged import PACKAGED, prepare
from table import OVER, rows_of, sentence_of
from worker import Worker, run, scratch_in

PACKED_EXPERTS = ["MXFP4 experts", "NF4 experts"]


def main() -> None:
    start = time.monotonic()
    options = parse_options(__doc__.partition("\n")[0])
    texts = read_texts(options.data)
    packaged = PACKAGED.get(options.model)
    of_model = packaged.needs() if packaged else []
    check_packages(of_model, options.quantized, options.experts)
    # By default, threads of Intel's OpenMP spin for 200 ms after their work, which would use the
    # cores during the other side's turn.
    os.environ.setdefault("KMP_BLOCKTIME", "10")
    # transformers calls its own old name and warns about it once in each run.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:`is_gradient_checkpointing`:FutureWarning")
    if packaged or options.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are local, so no request
    if packaged:
        options.model = str(prepare(packaged))
    settings = vars(options) | {"alpha": 2 * options.rank}
    machine = run("measuring the machine", "machine", settings)
    settings |= {"device": machine.pop("device"), "dtype": machine["dtype_choice"]["dtype"]}
    settings["steps"] = options.steps or (5 if settings["dtype"] == "float32" else 8)
    with scratch_in(options.out) as scratch:
        if options.model is None:
            settings["model"] = str(scratch / "small-moe")
            run(
                "making the model", "small_moe", {"folder": settings["model"], "seed": options.seed}
            )
        results = train(settings | {"texts": texts, "scratch": scratch}, options.out)
        ratios = {f"step_time_over_{side.lower()}": step_time_over(side, results) for side in OVER}
        report = {"settings": settings, **machine, "results": results, **ratios}
        print_results(report)
        write(report, scratch, options.out)
    seconds = f"{time.monotonic() - start:.0f} s in all"
    print(f"adapter/, checkpoints/, loss.json and loss.png are in {options.out} ({seconds})")
    if options.compare:
        print(f"\n{sentence_of(report)}")


def train(settings: dict, out: Path) -> dict[str, dict]:
    """Train all sides in turns.  Move the adapter and the checkpoints to --out."""
    names = sides_of(settings)
    results, sides = dict.fromkeys(names), []
    try:
        first = sorted(names, key=lambda name: name != "fastlora")  # PEFT loads its adapter
        for number, name in enumerate(first, 1):
            print(f"\n--- {name} ({number} of {len(names)}): loading the model", flush=True)
            sides.append(Worker(name, "train_one", settings | side_settings(name, settings)))
            sides[-1].answer()
        take_turns(sides, settings["steps"])
        for side in reversed(sides):  # fastlora is last: it loads a second model for its check
            print(f"\n--- {side.name}: measuring what it saves for the backward", flush=True)
            results[side.name] = side.go()
            side.process.join()
    finally:
        keep_checkpoints(settings["scratch"], out)
    (out / "adapter").mkdir(exist_ok=True)
    for file in (settings["scratch"] / "adapter").iterdir():
        os.replace(file, out / "adapter" / file.name)
    return results


def sides_of(settings: dict) -> list[str]:
    """The names of the sides, in the order of the table."""
    names = [*["frozen"] * settings["frozen"], *["PEFT"] * settings["compare"]]
    names += ["fastlora", *["int8"] * settings["int8"]]
    if settings["quantized"]:
        names += ["dense", *["GGUF"] * any(Path(settings["model"]).glob("*.gguf"))]
    return names + PACKED_EXPERTS * settings["experts"]


def side_settings(name: str, settings: dict) -> dict:
    """The options of one side.

    A side with the name of a base runs fastlora over it.  With --quantized the other sides' base is
    NF4.
    """
    named = "dense", "GGUF", *PACKED_EXPERTS
    base = name if name in named else "NF4" if settings["quantized"] else "dense"
    return {"side": name, "base": base}


def take_turns(sides: list[Worker], steps: int) -> None:
    """Let the sides step one after another.  Each step begins with the next side."""
    from tqdm import tqdm

    losses = {side.name: "" for side in sides}
    turns = {"total": steps * len(sides), "unit": "turn"}
    with tqdm(desc=f"training with {', '.join(losses)}", **turns) as bar:
        for step in range(steps):
            first = step % len(sides)
            for side in sides[first:] + sides[:first]:
                losses[side.name] = f"{side.go():.3f}"
                bar.set_postfix(losses)
                bar.update()


def keep_checkpoints(scratch: Path, out: Path) -> None:
    """Replace earlier checkpoints by complete new ones (trainer_state.json is written last)."""
    whole = [path.parent for path in scratch.glob("checkpoints/*/checkpoint-*/trainer_state.json")]
    for kept in {out / "checkpoints" / path.parent.name for path in whole}:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
    for path in whole:
        os.replace(path, out / path.relative_to(scratch))


def step_time_over(base: str, results: dict[str, dict]) -> dict[str, dict]:
    """For each other side: the ratio of each pair of steps, with median and quartiles."""
    ratios = {}
    seconds = {side: result["seconds_per_step"] for side, result in results.items()}
    theirs = seconds.pop(base, [])
    for side, ours in seconds.items() if theirs else ():
        pairs = [our / their for our, their in zip(ours, theirs, strict=True)]
        low, middle, high = quantiles(pairs, method="inclusive") if pairs[1:] else 3 * pairs
        ratios[side] = {"pairs": pairs, "median": middle, "quartiles": [low, high]}
    return ratios


def print_results(report: dict) -> None:
    """Print the table of all sides that table.py makes, and notes on its rows."""
    results = report["results"]
    rows = rows_of(report)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for title, *cells in rows:
        print(title.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="  ")
    print("\na step: forward, backward and optimizer; the sides take turns")
    if "frozen" in results:
        print("frozen: without adapters and optimizer; its backward goes down to the embeddings")
    print("weights resident, where they differ: of the base, counted, with the embeddings")
    if "dense" in results:
        print("fastlora, PEFT: over NF4; dense, GGUF: fastlora's, over such weights")
    if PACKED_EXPERTS[0] in results:
        print(f"{', '.join(PACKED_EXPERTS)}: fastlora's, over experts that are packed so")
    print("peak memory growth: in training; on a CPU, of what the side's process has resident")
    print("kept for the backward: by one forward of a batch, without the parameters\n")
    small = results["fastlora"]["resized"]
    losses = ", ".join(f"{loss:.3f} at rank {r}" for r, loss in small["losses"].items())
    print(f"fastlora's adapter: effective rank {small['effective_rank']:.1f} on average", end="")
    print(f"; held-out loss after resize_adapter: {losses}" if losses else "")


def write(report: dict, scratch: Path, out: Path) -> None:
    from plot import plot

    del report["settings"]["out"]  # loss.json may be published, so it has no paths
    for name in ("model", "data"):
        if path := report["settings"][name]:
            report["settings"][name] = Path(path).name
    (scratch / "loss.json").write_text(to_json(report) + "\n")
    plot(scratch / "loss.json", scratch / "loss.png")
    for name in ("loss.json", "loss.png"):
        os.replace(scratch / name, out / name)


def to_json(value: object, indent: str = "\n") -> str:
    """JSON with a line for each entry of a long dict; lists and short dicts take one line."""
    text = json.dumps(value)
    if not isinstance(value, dict) or len(text) < 240:
        return text
    inner = indent + "  "
    entries = [f"{inner}{json.dumps(key)}: {to_json(value[key], inner)}" for key in value]
    return f"{{{','.join(entries)}{indent}}}"


def interrupted_once(signum: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not stop the clean-up
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted_once)
    signal.signal(signal.SIGTERM, interrupted_once)
    try:
        main()
    except OSError as error:  # such as a full disk
        sys.exit(f"finetune.py: error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: nothing half-written is left", file=sys.stderr)
        sys.exit(130)
