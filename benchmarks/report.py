"""The tables that people read, as text and as Markdown.

``python benchmarks/report.py [--brief] RESULTS.json [PART ...]`` prints a committed file as
Markdown: all rows, or those whose id has one of the parts; also the demo's loss.json.  It needs
Python alone, so that the file can be read where torch is not installed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

_SHORT = {"peft": "PEFT", "fastlora, same dtype": "same dtype"}
_TITLES = {
    "layers": "Medians of pairs, each over the first contestant's time in the same round; "
    "quartiles of fastlora's. Kept for backward: x + what is added to it.",
    "optimized": "The same of PEFT's own layers; fastlora: after fastlora.optimize.",
    "overhead": "CPU time of one eager call of a tiny layer, one thread.",
    "gpu": "On the GPU. wall: what a caller waits for; graph: the forward in a CUDA graph; all "
    "else is the device's own time.",
    "base": "This tree's fastlora over the base's.",
}


def text(rows: list[dict]) -> str:
    """Aligned columns for a terminal."""
    return "\n\n".join(f"{title}\n\n{align(table)}" for title, table in _tables(rows))


def markdown(rows: list[dict], machine: dict) -> str:
    """Tables for a README, the machine first."""
    instructions = [
        name for key, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if machine[key]
    ]
    cpu = (
        f"{machine['cpu']}, {machine['threads']} threads, "
        f"{' and '.join(instructions) or 'no bfloat16 instructions'}"
    )
    lines = [
        f"{machine.get('gpu', cpu)}; torch {machine['torch']}, "
        f"PEFT {machine['peft']}, Python {machine['python']}; {machine['date']}."
    ]
    for title, table in _tables(rows):
        head, *body = (f"| {' | '.join(cells)} |" for cells in table)
        lines += ["", f"{title}", "", head, "|---" * len(table[0]) + "|", *body]
    return "\n".join(lines)


def _tables(rows: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Title, and head and cells, of each table that has any rows."""
    tables = [(title, _times([r for r in rows if r["table"] == t])) for t, title in _TITLES.items()]
    tuned = [_tuned(row) for row in rows if "candidates" in row]
    tests = [(row["id"], row["outcome"]) for row in rows if "outcome" in row]
    failures = [failure for row in rows for failure in _failures(row)]
    tables += [
        ("The best tiles of each of a launcher's calls, and what they reach.", [_TUNED, *tuned]),
        ("Tests on this device.", [("tests", "outcome"), *tests]),
        ("What failed, or could not run.", [("what", "why"), *failures]),
    ]
    return [(title, table) for title, table in tables if len(table) > 1]


def _times(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each quantity of each row, a column for each contestant."""
    timed = [(row, quantity) for row in rows for quantity in row.get("ratios", ())]
    seconds = [row["seconds"][quantity] for row, quantity in timed]
    names = list(dict.fromkeys(name for each in seconds for name in list(each)[1:]))
    kept = [name for name in ("fastlora", "peft") if any(row.get("saved") for row in rows)]
    head = ["M x K x N, dtype, r, dropout", "time", *{f"{next(iter(each))} µs" for each in seconds}]
    head += [*(_SHORT.get(name, name) for name in names), "quartiles"]
    head += ["over PEFT"] * ("peft" in names)
    lines = [(*head, *(f"{_SHORT.get(name, name)} keeps" for name in kept), "target")]
    for row, quantity in timed:
        first, found = next(iter(row["seconds"][quantity])), row["ratios"][quantity]
        lines.append(
            (
                row["id"],
                quantity,
                f"{row['seconds'][quantity][first] * 1e6:.4g}",
                *(_median(found, f"{name}/{first}") for name in names),
                _quartiles(found.get(f"fastlora/{first}")),
                *[_median(found, "fastlora/peft")] * ("peft" in names),
                *(_saved(row["saved"].get(name)) for name in kept),
                _verdicts([each for each in row["targets"] if each["quantity"] == quantity]),
            )
        )
    return lines


_TUNED = ("call", "tried", "best", "default/best", "fused/in place", "TFLOP/s", "GB/s")


def _tuned(row: dict) -> tuple[str, ...]:
    return (
        row["id"],
        f"{row['tried']} of {row['candidates']}",
        row.get("best", "none ran"),
        _median(row, "default/best"),
        _median(row, "fused/in place"),
        f"{row.get('tflops', '–')}",
        f"{row.get('gbs', '–')}",
    )


def _failures(row: dict) -> list[tuple[str, str]]:
    found = {**row.get("failures", {}), **row.get("skipped", {})}
    return [(f"{row['id']}, {name}", " ".join(why.split())[-200:]) for name, why in found.items()]


def _median(found: dict, ratio: str) -> str:
    return f"{found[ratio][1]:.3f}" if ratio in found else "–"


def _quartiles(ratio: list[float] | None) -> str:
    return "–" if ratio is None else f"{ratio[0]:.2f}–{ratio[2]:.2f}"


def _saved(saved: dict | None) -> str:
    return "–" if saved is None else f"{_bytes(saved['x'])} + {_bytes(saved['added'])}"


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B" if count else "0"


def _verdicts(targets: list[dict]) -> str:
    """``≤ 1.08 × frozen met``; a miss repeats the value, since rounding may hide by how little."""
    verdicts = []
    for target in targets:
        verdict = "met" if target["met"] else f"MISSED ({target['value']:.3f})"
        below = target["ratio"].split("/")[1]
        verdicts.append(f"≤ {target['limit']:g} × {_SHORT.get(below, below)} {verdict}")
    return ", ".join(verdicts)


def align(table: Sequence[tuple]) -> str:
    """Columns of a common width."""
    lines = [[str(cell) for cell in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{width}}}" for width in widths)
    return "\n".join(form.format(*line).rstrip() for line in lines)


def brief(rows: list[dict]) -> str:
    """The few columns that a README shows: forward + backward, and what waits for the backward."""
    lines = [
        "| M x K x N, dtype, r, dropout | frozen | fastlora | PEFT | fastlora keeps | PEFT keeps |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        both, saved = row["ratios"]["both"], row["saved"]
        cells = (
            row["id"],
            "1",
            *(f"{both[ratio][1]:.2f}" for ratio in ("fastlora/frozen", "peft/frozen")),
            *(_bytes(saved[side]["x"] + saved[side]["added"]) for side in ("fastlora", "peft")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def demo(results: dict[str, dict]) -> str:
    """The sides of ``make demo``, from its loss.json; each ratio is to PEFT."""
    names = {"fastlora": "fastlora", "PEFT": "PEFT", "optimized": "PEFT, optimized"}
    rows = (
        ("held-out loss before", lambda side: side["held_out_loss"][0][1], "{:.3f}"),
        ("held-out loss after", lambda side: side["held_out_loss"][-1][1], "{:.3f}"),
        ("tokens / s, median step", lambda side: side["tokens_per_second"], "{:.0f}"),
        ("peak memory growth, MiB", lambda side: side["peak_memory_growth"] / 2**20, "{:.0f}"),
        ("kept for the backward, MiB", lambda side: side["kept_for_backward"] / 2**20, "{:.0f}"),
    )
    sides = [side for side in names if side in results]
    others = [side for side in sides if side != "PEFT"]
    heads = [*(names[side] for side in sides), *(f"{names[side]} / PEFT" for side in others)]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for title, value, form in rows:
        values = {side: value(results[side]) for side in sides}
        cells = [form.format(values[side]) for side in sides]
        cells += [f"{values[side] / values['PEFT']:.2f}" for side in others]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--brief"]
    if not arguments:
        sys.exit("usage: python benchmarks/report.py [--brief] RESULTS.json [PART OF AN ID ...]")
    results = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    if "rows" not in results:
        print(demo(results["results"]))
        return
    parts = arguments[1:] or [""]
    rows = [row for row in results["rows"] if any(part in row["id"] for part in parts)]
    print(brief(rows) if "--brief" in sys.argv else markdown(rows, results["machine"]))


if __name__ == "__main__":
    main()
