"""Fine-tune a language model with fastlora and, beside it, with PEFT from the same start.

    python examples/finetune.py      SmolLM2 135M on Python's documentation: 3 min on 2 cores
    python examples/finetune.py --steps 40       the same for longer
    python examples/finetune.py --experts        a small mixture of experts, dense and packed
    python examples/finetune.py --quantized      over NF4 and over GGUF's blocks, and dense
    python examples/finetune.py --model gemma    Gemma 3 270M, under the Gemma Terms of Use
    python examples/finetune.py --model ./my-model --data my.jsonl --target all-linear --no-compare

Each side has a process of its own, and they step in turn; how fastlora is used is in train_one.py.
--out gets the adapter, loss.png, loss.json and Trainer's checkpoints, each whole or not at all.
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
from table import OVER, rows_of
from worker import Worker, run, scratch_in

PACKED_EXPERTS = ["MXFP4 experts", "NF4 experts"]


def main() -> None:
    start = time.monotonic()
    options = parse_options(__doc__.partition("\n")[0])
    texts = read_texts(options.data)
    packaged = PACKAGED.get(options.model)
    of_model = packaged.needs() if packaged else []
    check_packages(options.compare, of_model, options.quantized, options.experts)
    # Intel's OpenMP, else 200 ms, would use the cores for as long in the other side's turn.
    os.environ.setdefault("KMP_BLOCKTIME", "10")
    # transformers' own call of its old name, once a run.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:`is_gradient_checkpointing`:FutureWarning")
    if packaged or options.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is here: no request, and no wait for it
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


def train(settings: dict, out: Path) -> dict[str, dict]:
    """Train all sides, in turns; move what they leave, adapter and checkpoints, to --out."""
    names = sides_of(settings)
    results, sides = dict.fromkeys(names), []
    try:
        for name in sorted(names, key=lambda name: name != "fastlora"):  # PEFT loads its adapter
            print(f"\n--- {name}: loading the model", flush=True)
            sides.append(Worker(name, "train_one", settings | side_settings(name, settings)))
            sides[-1].answer()
        take_turns(sides, settings["steps"])
        for side in reversed(sides):  # the others leave before fastlora loads a model anew
            results[side.name] = side.go()
            side.process.join()
    finally:
        keep_checkpoints(settings["scratch"], out)
    (out / "adapter").mkdir(exist_ok=True)
    for file in (settings["scratch"] / "adapter").iterdir():
        os.replace(file, out / "adapter" / file.name)
    return results


def sides_of(settings: dict) -> list[str]:
    """As they are printed."""
    names = [*["frozen"] * settings["frozen"], *["PEFT"] * settings["compare"]]
    names += [*["optimized"] * settings["optimize"], "fastlora"]
    if settings["quantized"]:
        names += ["dense", *["GGUF"] * any(Path(settings["model"]).glob("*.gguf"))]
    return names + PACKED_EXPERTS * settings["experts"]


def side_settings(name: str, settings: dict) -> dict:
    """The sides named for their base are fastlora's; with --quantized the others' is NF4."""
    named = "dense", "GGUF", *PACKED_EXPERTS
    base = name if name in named else "NF4" if settings["quantized"] else "dense"
    return {"side": name, "base": base, "with_peft": name in ("PEFT", "optimized")}


def take_turns(sides: list[Worker], steps: int) -> None:
    """One step of each side after the other; who goes first changes with each step."""
    from tqdm import tqdm

    losses = {side.name: "" for side in sides}
    with tqdm(total=steps, desc=f"training with {', '.join(losses)}") as bar:
        for step in range(steps):
            first = step % len(sides)
            for side in sides[first:] + sides[:first]:
                losses[side.name] = f"{side.go():.3f}"
            bar.set_postfix(losses)
            bar.update()


def keep_checkpoints(scratch: Path, out: Path) -> None:
    """Put whole checkpoints (Trainer writes trainer_state.json last) in earlier ones' place."""
    whole = [path.parent for path in scratch.glob("checkpoints/*/checkpoint-*/trainer_state.json")]
    for kept in {out / "checkpoints" / path.parent.name for path in whole}:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
    for path in whole:
        os.replace(path, out / path.relative_to(scratch))


def step_time_over(base: str, results: dict[str, dict]) -> dict[str, dict]:
    """For each other side, the ratio of each pair of steps; their median and quartiles."""
    ratios = {}
    seconds = {side: result["seconds_per_step"] for side, result in results.items()}
    theirs = seconds.pop(base, [])
    for side, ours in seconds.items() if theirs else ():
        pairs = [our / their for our, their in zip(ours, theirs, strict=True)]
        low, middle, high = quantiles(pairs, method="inclusive") if pairs[1:] else 3 * pairs
        ratios[side] = {"pairs": pairs, "median": middle, "quartiles": [low, high]}
    return ratios


def print_results(report: dict) -> None:
    """The sides next to each other, as table.py has them for a page."""
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

    del report["settings"]["out"]  # where files lie is nobody else's business
    for name in ("model", "data"):
        if path := report["settings"][name]:
            report["settings"][name] = Path(path).name
    (scratch / "loss.json").write_text(to_json(report) + "\n")
    plot(scratch / "loss.json", scratch / "loss.png")
    for name in ("loss.json", "loss.png"):
        os.replace(scratch / name, out / name)


def to_json(value: object, indent: str = "\n") -> str:
    """A line for each entry of a dict; lists, and dicts that are short, on one line."""
    text = json.dumps(value)
    if not isinstance(value, dict) or len(text) < 240:
        return text
    inner = indent + "  "
    entries = [f"{inner}{json.dumps(key)}: {to_json(value[key], inner)}" for key in value]
    return f"{{{','.join(entries)}{indent}}}"


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
