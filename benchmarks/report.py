"""The tables of a results file: in columns, or the short tables of docs/ as Markdown.

``python benchmarks/report.py [--brief] RESULTS.json [PART ...]`` prints a committed file: all rows,
or the rows whose id contains one of the parts.  A part with * must match a whole id.  It needs only
Python, so that a file can be read without torch.
"""

import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

Table = list[tuple[str, ...]]  # the head, and then the lines
# A row of a results file has for each quantity (forward, both, …) the seconds of each contestant,
# and under "ratios" for each pair "one/other" the (first quartile, median, third quartile).
_SHORT = {"peft": "PEFT", "fastlora, same dtype": "same dtype"}
_TITLES = {
    "layers": "Medians of pairs, as ratios to the first contestant's time in the same round; "
    "quartiles of fastlora's. Saved for backward: x + all other tensors.",
    "optimized": "The same for PEFT's layers; fastlora: after fastlora.optimize.",
    "mixed": "Rows of 8 adapters in one batch; single calls: lora_linear for each of them.",
    "experts": "Experts, for one choice of a trained router. Peak: torch's peak allocation in a "
    "step.",
    "mlp": "A gated MLP: fastlora as one block, and its three layers one by one.",
    "step": "A training step of a model: forward, backward, clipping, AdamW. The frozen model's "
    "backward runs down to its embeddings.",
    "quantized": "A quantized base, compared with the frozen layer with the dequantized weight. "
    "Peak: torch's peak allocation in a step.",
    "few": "CPU time of a call of few rows, one thread.",
    "host": "The host's time of a step on a GPU. forward, both: measured, without the driver's "
    "part of launches; modeled: both + 3 µs for each launch, torch's and Triton's (assumed).",
    "gpu": "On the GPU. wall: the caller's waiting time; graph: the forward in a CUDA graph; all "
    "others: the device's own time.",
    "sweep": "A step of eight LoRA configurations at once, compared with the steps of eight runs "
    "one after the other, by tokens of each (tools/sweep_speed.py).",
    "base": "This tree's fastlora compared with the base's.",
}


def text(rows: list[dict]) -> str:
    """All tables that have a line, in aligned columns."""
    return "\n\n".join(f"{title}\n\n{align(table)}" for title, table in _tables(rows))


def heading(machine: dict) -> str:
    bf16 = "AMX" if machine["amx_bf16"] else "AVX512" if machine["avx512_bf16"] else "no"
    if kept_to := machine.get("kept_to"):
        bf16 = f"limited to {kept_to}: {'AVX512' if 'BF16' in kept_to else 'no'}"
    cpu = f"{machine['cpu']}, {machine['threads']} threads, {bf16} bfloat16 instructions"
    versions = (f"{name} {machine[name]}" for name in ("torch", "peft", "python"))
    return f"{machine.get('gpu', cpu)}; {', '.join(versions)}; {machine['date']}"


def _tables(rows: list[dict]) -> list[tuple[str, Table]]:
    tables = [(title, _times([r for r in rows if r["table"] == t])) for t, title in _TITLES.items()]
    tests = [(row["id"], row["outcome"]) for row in rows if "outcome" in row]
    failures = [
        (f"{row['id']}, {name}", " ".join(why.split())[-200:])
        for row in rows
        for name, why in (row.get("failures", {}) | row.get("skipped", {})).items()
    ]
    tables += [
        ("The rate of a call: FLOPs of the base product, or else bytes.", _called(rows)),
        ("Tests on this device.", [("test", "outcome"), *tests]),
        ("Failed or skipped.", [("row", "reason"), *failures]),
    ]
    return [(title, table) for title, table in tables if len(table) > 1]


def _times(rows: list[dict]) -> Table:
    """A line for each quantity of each row, a column for each contestant.

    Times are ratios to the row's first contestant, whose microseconds are also shown.
    """
    timed = [(row, quantity) for row in rows for quantity in row.get("ratios", ())]
    seconds = [row["seconds"][quantity] for row, quantity in timed]
    names = list(dict.fromkeys(name for each in seconds for name in list(each)[1:]))
    kept = [name for name in ("fastlora", "peft") if any(row.get("saved") for row in rows)]
    peaks = list(dict.fromkeys(name for row in rows for name in row.get("peak", ())))
    kept = peaks or kept
    head = ["M x K x N, dtype, r, dropout", "time", *{f"{next(iter(each))} µs" for each in seconds}]
    head += [*(_SHORT.get(name, name) for name in names), "quartiles"]
    head += ["/ PEFT"] * ("peft" in names)
    head += [f"{_SHORT.get(name, name)} saves" for name in kept]
    head += [f"{_SHORT.get(name, name)} peak" for name in peaks]
    lines = [(*head, "target")]
    for row, quantity in timed:
        first, ratios = next(iter(row["seconds"][quantity])), row["ratios"][quantity]
        low, _, high = ratios[f"fastlora/{first}"]
        line = [row["id"], quantity, f"{row['seconds'][quantity][first] * 1e6:.4g}"]
        line += [*(_median(ratios, f"{name}/{first}") for name in names), f"{low:.2f}–{high:.2f}"]
        line += [_median(ratios, "fastlora/peft")] * ("peft" in names)
        for saved in (row["saved"].get(name) for name in kept):
            line.append(f"{_bytes(saved['x'])} + {_bytes(saved['added'])}" if saved else "–")
        line += [_bytes(row["peak"][name]) if name in row["peak"] else "–" for name in peaks]
        # Targets of memory stand in the line of "both".
        shown = (quantity, *("kept", "peak") * (quantity == "both"))
        line.append(", ".join(_verdict(t) for t in row["targets"] if t["quantity"] in shown))
        lines.append(tuple(line))
    return lines


def _called(rows: list[dict]) -> Table:
    """A line for each plan or implementation of a call."""
    lines = [("call", "by", "µs", "TFLOP/s or TB/s")]
    for row in (row for row in rows if "rates" in row):
        for name, rate in row["rates"].items():
            by = name + " (default)" * (name == row["default"])
            lines.append((row["id"], by, f"{row['seconds'][name] * 1e6:.4g}", f"{rate:.4g}"))
    return lines


def _median(ratios: dict, pair: str) -> str:
    return f"{ratios[pair][1]:.3f}" if pair in ratios else "–"


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B" if count else "0"


def _verdict(target: dict) -> str:
    """``≤ 1.08 × frozen met``; a miss repeats the value, because the column is rounded."""
    verdict = "met" if target["met"] else f"MISSED ({target['value']:.3f})"
    below = target["ratio"].split("/")[1]
    times = "" if below == "MiB" else "× "
    what = f"{target['quantity']} " * (target["quantity"] in ("kept", "peak"))
    return f"{what}≤ {target['limit']:g} {times}{_SHORT.get(below, below)} {verdict}"


def align(table: Sequence[tuple]) -> str:
    """The table as text, with aligned columns."""
    lines = [[str(cell) for cell in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{width}}}" for width in widths)
    return "\n".join(form.format(*line).rstrip() for line in lines)


def pipes(table: Sequence[Sequence[str]]) -> str:
    """The table as Markdown."""
    head, *lines = ("|" + "".join(f" {c} |" if c else " |" for c in cells) for cells in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *lines])


def brief(rows: list[dict]) -> str:
    """The short table: forward + backward, and the memory that is saved for the backward."""
    if any("peak" in row for row in rows):
        return _brief_of_blocks(rows)
    if all(row["table"] == "host" for row in rows):
        return _brief_of_hosts(rows)
    if all(not row.get("saved") for row in rows):
        return _brief_of_steps(rows)
    heads = ("frozen", "fastlora", "PEFT", "fastlora saves", "PEFT saves")
    lines = [("M x K x N, dtype, r, dropout", *heads)]
    for row in rows:
        both, saved = row["ratios"]["both"], row["saved"]
        ratios = [f"{both[f'{side}/frozen'][1]:.2f}" for side in ("fastlora", "peft")]
        kept = [_bytes(saved[side]["x"] + saved[side]["added"]) for side in ("fastlora", "peft")]
        lines.append((row["id"], "1", *ratios, *kept))
    return pipes(lines)


def _brief_of_blocks(rows: list[dict]) -> str:
    """Times as ratios to the frozen block's, and MiB: saved, and at the peak of a step."""
    names = list(dict.fromkeys(name for row in rows for name in row["peak"]))
    shown = [_SHORT.get(name, name) for name in names]
    head = [f"{name}: time" for name in shown] + [f"saved, peak: {name}" for name in shown]
    lines = [("", *head)]
    for row in rows:
        both, line = row["ratios"]["both"] | {"frozen/frozen": [1, 1, 1]}, [row["id"]]
        line += [_median(both, f"{name}/frozen").removesuffix(".000") for name in names]
        for name in names:
            sizes = sum(row["saved"].get(name, {}).values()), row["peak"].get(name)
            line.append(", ".join(f"{size / 2**20:.1f}" for size in sizes) if sizes[1] else "–")
        lines.append(tuple(line))
    return pipes(lines)


def _brief_of_steps(rows: list[dict]) -> str:
    """The ratio of each step's time to another's, and its quartiles."""
    lines = [("", "ratio to", "time of a step (quartiles)")]
    for row in rows:
        for pair, (low, median, high) in row["ratios"]["step"].items():
            name, over = pair.split("/")
            lines.append((f"{row['id']}, {name}", over, f"{median:.2f} ({low:.2f}–{high:.2f})"))
    return pipes(lines)


def _brief_of_hosts(rows: list[dict]) -> str:
    """Each ratio to PEFT's time, measured and modeled, beside the goal."""
    lines = [("", "launches", "PEFT's", "measured", "modeled", "goal")]
    for row in rows:
        goals = {each["ratio"]: each["limit"] for each in row["targets"]}
        for name in (name for name in ("fastlora", "peft, optimized") if name in row["kernels"]):
            pair = f"{name}/peft"
            counts = [str(sum(row["kernels"][its])) for its in (name, "peft")]
            medians = [f"{row['ratios'][time][pair][1]:.2f}" for time in ("both", "modeled")]
            lines.append((f"{row['id']}, {name}", *counts, *medians, f"{goals[pair]:.2f}"))
    return pipes(lines)


def main() -> None:
    file, *parts = [argument for argument in sys.argv[1:] if argument != "--brief"]
    results = json.loads(Path(file).read_text(encoding="utf-8"))
    patterns = [part if "*" in part else f"*{part}*" for part in parts or ["*"]]
    rows = [row for row in results["rows"] if any(fnmatchcase(row["id"], p) for p in patterns)]
    whole = f"{heading(results['machine'])}\n\n{text(rows)}"
    print(brief(rows) if "--brief" in sys.argv else whole)


if __name__ == "__main__":
    main()
