"""The tables that people read, as text and as Markdown.

``python benchmarks/report.py [--brief] RESULTS.json [PART ...]`` prints a committed file as
Markdown: all rows, or those whose id has one of the parts; also the demo's loss.json.  It needs
Python alone, so that the file can be read where torch is not installed.
"""

import json
import sys
from pathlib import Path

_SHORT = {
    "fastlora/frozen": "frozen",
    "fastlora/peft": "PEFT",
    "fastlora/fastlora, same dtype": "same dtype",
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


def text(rows: list[dict]) -> str:
    """Aligned columns for a terminal."""
    return "\n\n".join(f"{title}\n\n{_align(table)}" for title, table in _tables(rows))


def markdown(rows: list[dict], machine: dict) -> str:
    """Tables for a README, the machine first."""
    instructions = [
        name for key, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if machine[key]
    ]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, "
        f"{' and '.join(instructions) or 'no bfloat16 instructions'}; torch {machine['torch']}, "
        f"PEFT {machine['peft']}, Python {machine['python']}; {machine['date']}."
    ]
    for title, table in _tables(rows):
        head, *body = (f"| {' | '.join(cells)} |" for cells in table)
        lines += ["", f"{title}", "", head, "|---" * len(table[0]) + "|", *body]
    return "\n".join(lines)


def _tables(rows: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Title, and head and cells, of each table that has any rows."""
    layers = [_layer_cells(row) for row in rows if row["table"] == "layers"]
    optimized = [_layer_cells(row) for row in rows if row["table"] == "optimized"]
    overhead = [
        cells for row in rows if row["table"] == "overhead" for cells in _overhead_cells(row)
    ]
    tables = []
    if layers:
        title = (
            "Time over the frozen layer's, medians of pairs (frozen ms: forward + backward). Saved "
            "for backward: x + what is added to it. f32adapter: float32 adapters over bfloat16."
        )
        tables.append((title, [_LAYERS, *layers]))
    if optimized:
        title = "The same of PEFT's own layers; fastlora: after fastlora.optimize."
        tables.append((title, [_LAYERS, *optimized]))
    if overhead:
        tables.append(
            ("CPU time of one eager call of a tiny layer, one thread.", [_OVERHEAD, *overhead])
        )
    return tables


def _layer_cells(row: dict) -> tuple[str, ...]:
    forward, both, saved = row["ratios"]["forward"], row["ratios"]["both"], row["saved"]
    return (
        row["id"],
        f"{row['seconds']['both']['frozen'] * 1e3:.3g}",
        f"{forward['fastlora/frozen'][1]:.2f}",
        f"{both['fastlora/frozen'][1]:.2f}",
        _quartiles(both["fastlora/frozen"]),
        f"{forward['peft/frozen'][1]:.2f}",
        f"{both['peft/frozen'][1]:.2f}",
        _quartiles(both["peft/frozen"]),
        f"{both['fastlora/peft'][1]:.2f}",
        _saved(saved["fastlora"]),
        _saved(saved["peft"]),
        _verdicts(row["targets"]),
    )


def _overhead_cells(row: dict) -> list[tuple[str, ...]]:
    return [
        (
            f"{row['id']}, {_QUANTITIES[quantity]}",
            *(f"{seconds[name] * 1e6:.1f}" for name in ("frozen", "fastlora", "peft")),
            f"{row['ratios'][quantity]['fastlora/peft'][1]:.2f}",
            _quartiles(row["ratios"][quantity]["fastlora/peft"]),
            _verdicts([target for target in row["targets"] if target["quantity"] == quantity]),
        )
        for quantity, seconds in row["seconds"].items()
    ]


def _quartiles(ratio: list[float]) -> str:
    return f"{ratio[0]:.2f}–{ratio[2]:.2f}"


def _saved(saved: dict) -> str:
    return f"{_bytes(saved['x'])} + {_bytes(saved['added'])}"


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
