"""The tables that people read, as text and as Markdown.

``python benchmarks/report.py [--brief] RESULTS.json [PART ...]`` prints a committed file as
Markdown: all rows, or those whose id has one of the parts; also the demo's loss.json.  It needs
Python alone, so that the file can be read where torch is not installed.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

_SHORT = {
    "fastlora/frozen": "frozen",
    "fastlora/peft": "PEFT",
    "fastlora/fastlora, same dtype": "same dtype",
    "fastlora/merged": "merged",
}
_QUANTITIES = {
    "forward": "forward, train",
    "inference": "forward, no_grad",
    "both": "forward + backward",
}

_LAYERS = (
    "M x K x N, dtype, r, dropout",
    "frozen ms",
    "fastlora fwd",
    "fwd+bwd",
    "quartiles",
    "PEFT fwd",
    "fwd+bwd",
    "quartiles",
    "fastlora/PEFT",
    "saved: fastlora",
    "saved: PEFT",
    "target",
)
_OVERHEAD = ("call", "frozen µs", "fastlora µs", "PEFT µs", "fastlora/PEFT", "quartiles", "target")
_BASE = ("call", "base ms", "fastlora ms", "fastlora/base", "quartiles")
_TUNE = ("call", "tried", "best", "default/best", "fused/in place", "TFLOP/s", "GB/s")
_TESTS = ("tests", "outcome")
_TITLES = {
    "layers": "Time over the frozen layer's, medians of pairs (frozen ms: forward + backward). "
    "Saved for backward: x + what is added to it. f32adapter: float32 adapters over bfloat16.",
    "optimized": "The same of PEFT's own layers; fastlora: after fastlora.optimize.",
    "overhead": "CPU time of one eager call of a tiny layer, one thread.",
    "gpu": "Time over the frozen layer's, medians of pairs. Of the device: forward, both (forward "
    "+ backward), inference, graph (in a CUDA graph). wall: what the caller waits for.",
    "base": "This tree's fastlora over the base's, pair by pair.",
    "tune": "The best tiles of a launcher's call, and what they reach.",
    "tests": "The tests, on this device.",
    "failures": "What failed, or could not run here.",
}


def text(rows: list[dict]) -> str:
    """Aligned columns for a terminal."""
    return "\n\n".join(f"{title}\n\n{_align(table)}" for title, table in _tables(rows))


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
    timed = [row for row in rows if row.get("ratios")]
    tables = [
        (_TITLES["layers"], [_LAYERS, *map(_layer_cells, _in(timed, "layers"))]),
        (_TITLES["optimized"], [_LAYERS, *map(_layer_cells, _in(timed, "optimized"))]),
        (_TITLES["overhead"], [_OVERHEAD, *_each(_overhead_cells, _in(timed, "overhead"))]),
        (_TITLES["gpu"], _gpu_table(_in(timed, "gpu"))),
        (_TITLES["base"], [_BASE, *_each(_base_cells, _in(timed, "base"))]),
        (_TITLES["tune"], [_TUNE, *map(_tune_cells, _in(rows, "tune"))]),
        (_TITLES["tests"], [_TESTS, *map(_tests_cells, _in(rows, "tests"))]),
        (_TITLES["failures"], [("what", "why"), *_each(_failures, rows)]),
    ]
    return [(title, table) for title, table in tables if len(table) > 1]


def _in(rows: list[dict], table: str) -> list[dict]:
    return [row for row in rows if row["table"] == table]


def _each(cells: Callable[[dict], list], rows: list[dict]) -> list:
    """For a row of several lines."""
    return [line for row in rows for line in cells(row)]


def _layer_cells(row: dict) -> tuple[str, ...]:
    forward, both, saved = row["ratios"]["forward"], row["ratios"]["both"], row["saved"]
    return (
        row["id"],
        f"{row['seconds']['both']['frozen'] * 1e3:.3g}",
        _median(forward, "fastlora/frozen"),
        _median(both, "fastlora/frozen"),
        _quartiles(both, "fastlora/frozen"),
        _median(forward, "peft/frozen"),
        _median(both, "peft/frozen"),
        _quartiles(both, "peft/frozen"),
        _median(both, "fastlora/peft"),
        _saved(saved, "fastlora"),
        _saved(saved, "peft"),
        _verdicts(row["targets"]),
    )


def _overhead_cells(row: dict) -> list[tuple[str, ...]]:
    return [
        (
            f"{row['id']}, {_QUANTITIES[quantity]}",
            *(_microseconds(seconds, name) for name in ("frozen", "fastlora", "peft")),
            _median(row["ratios"][quantity], "fastlora/peft"),
            _quartiles(row["ratios"][quantity], "fastlora/peft"),
            _verdicts([target for target in row["targets"] if target["quantity"] == quantity]),
        )
        for quantity, seconds in row["seconds"].items()
    ]


def _gpu_table(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each quantity, a column for each contestant."""
    names = list(dict.fromkeys(name for row in rows for name in row["errors"] if name != "frozen"))
    lines = [("over frozen", "quantity", "frozen ms", *names, "target")]
    for row in rows:
        for quantity, found in row["ratios"].items():
            lines.append(
                (
                    row["id"],
                    quantity,
                    f"{row['seconds'][quantity]['frozen'] * 1e3:.3g}",
                    *(_median(found, f"{name}/frozen", 3) for name in names),
                    _verdicts([each for each in row["targets"] if each["quantity"] == quantity]),
                )
            )
    return lines


def _base_cells(row: dict) -> list[tuple[str, ...]]:
    return [
        (
            f"{row['id']}, {quantity}",
            f"{seconds['base'] * 1e3:.3g}",
            f"{seconds['fastlora'] * 1e3:.3g}",
            _median(row["ratios"][quantity], "fastlora/base", 3),
            _quartiles(row["ratios"][quantity], "fastlora/base", 3),
        )
        for quantity, seconds in row["seconds"].items()
    ]


def _tune_cells(row: dict) -> tuple[str, ...]:
    return (
        row["id"],
        f"{row['tried']} of {row['candidates']}",
        row.get("best", "none ran"),
        _median(row, "default/best", 3),
        _median(row, "fused/in place", 3),
        f"{row.get('tflops', '–')}",
        f"{row.get('gbs', '–')}",
    )


def _tests_cells(row: dict) -> tuple[str, ...]:
    return row["id"], row["outcome"]


def _failures(row: dict) -> list[tuple[str, str]]:
    found = {**row.get("failures", {}), **row.get("skipped", {})}
    return [(f"{row['id']}, {name}", " ".join(why.split())[:200]) for name, why in found.items()]


def _median(found: dict, ratio: str, digits: int = 2) -> str:
    return f"{found[ratio][1]:.{digits}f}" if ratio in found else "–"


def _quartiles(found: dict, ratio: str, digits: int = 2) -> str:
    if ratio not in found:
        return "–"
    low, _, high = found[ratio]
    return f"{low:.{digits}f}–{high:.{digits}f}"


def _microseconds(seconds: dict, name: str) -> str:
    return f"{seconds[name] * 1e6:.1f}" if name in seconds else "–"


def _saved(saved: dict, name: str) -> str:
    if name not in saved:
        return "–"
    return f"{_bytes(saved[name]['x'])} + {_bytes(saved[name]['added'])}"


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
        verdicts.append(f"≤ {target['limit']:g} × {_SHORT[target['ratio']]} {verdict}")
    return ", ".join(verdicts)


def _align(table: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    )


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
