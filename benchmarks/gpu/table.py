"""The short table that a visit ends with: at most 40 lines, each short."""

_WIDTH = 240
_LEGEND = (
    "(ratios of time; ms: the frozen layer's; both: forward + backward; graph: forward in a CUDA "
    "graph; peft': PEFT's formula written out; TF, GB/s: of the fused plan)"
)
_COLUMNS = {
    "fused": "fused",
    "in place": "in place",
    "torch backend": "torch",
    "addmm chain": "addmm",
    "peft formula": "peft'",
    "peft formula, float32 adapter": "peft' f32",
    "peft": "peft",
    "peft, float32 adapter": "peft f32",
    "merged": "merged",
    "compiled peft formula": "compiled",
}
_MOST = {"layers": 13, "launches": 5, "tuning": 9, "failures": 7}


def table(results: dict) -> str:
    rows = results["rows"]

    def of(name: str) -> list[dict]:
        return [row for row in rows if row["table"] == f"gpu-{name}"]

    lines = [_head(results), _tests(of("tests"), results)]
    lines += _layers(of("layers"))
    lines += [line for row in of("launches")[:2] for line in _launches(row)][: _MOST["launches"]]
    lines += [_tuned(row) for row in of("tuning")][: _MOST["tuning"]]
    lines += _failures(results)
    return "\n".join(line[:_WIDTH] for line in lines)


def _head(results: dict) -> str:
    machine, steps = results["machine"], results["steps"]
    took = ", ".join(f"{name} {step['seconds']:.0f}" for name, step in steps.items())
    dry = "DRY, its times mean nothing: " if results["dry"] else ""
    device = machine.get("gpu", machine["device"])
    return f"{dry}{device}, torch {machine.get('torch')}, triton {machine.get('triton')}; s: {took}"


def _tests(found: list[dict], results: dict) -> str:
    if not found:
        return "tests: not run" if "tests" not in results["steps"] else "tests: no result"
    row = found[0]
    counts = ", ".join(f"{number} {kind}" for kind, number in row["counts"].items())
    late = f", {row['interrupted']} of {row['processes']} interrupted" * (row["interrupted"] > 0)
    return f"tests: {counts or 'no counts'} of {row['collected']}{late}"


def _layers(rows: list[dict]) -> list[str]:
    """Each quantity's frozen time, and ratios over it; ``-`` where a candidate has no time."""
    if not rows:
        return []
    shown = [
        (row, quantity)
        for row in rows
        for quantity in ("both", "graph")
        if quantity in row["ratios"] and not (quantity == "graph" and "both" in row["ratios"])
    ]
    present = [name for name in _COLUMNS if any(name in row["judged"] for row, _ in shown)]
    head = ["over frozen", "ms", *(_COLUMNS[name] for name in present), "fused fwd", "fused does"]
    cells = [head]
    for row, quantity in shown[: _MOST["layers"]]:
        ratios, seconds = row["ratios"][quantity], row["seconds"][quantity]
        forward = row["ratios"].get("forward", {})
        cells.append(
            [
                f"{row['id'].replace('-bf16', '')} {quantity}",
                f"{1e3 * seconds['frozen']:.3g}",
                *(_ratio(ratios, name) for name in present),
                _ratio(forward, "fused"),
                _speed(row, quantity),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return [*lines, _LEGEND]


def _ratio(ratios: dict, name: str) -> str:
    found = ratios.get(f"{name}/frozen")
    return "-" if found is None else f"{found[1]:.3f}"


def _speed(row: dict, quantity: str) -> str:
    work = row.get("work", {}).get("inference" if quantity == "graph" else quantity)
    seconds = row["seconds"][quantity].get("fused")
    if not work or not seconds:
        return "-"
    return f"{work['flops'] / seconds / 1e12:.0f} TF {work['bytes'] / seconds / 1e9:.0f} GB/s"


def _launches(row: dict) -> list[str]:
    parts = []
    for each in row["launches"]:
        mm = each.get("mm_seconds")
        beside = f" (mm {1e3 * mm:.3g})" if mm else ""
        parts.append(f"{each['kernel']} {1e3 * each['seconds']:.3g}{beside}")
    return [f"ms alone, {row['id']}: {', '.join(parts)}"]


def _tuned(row: dict) -> str:
    if "best" not in row:
        return f"tuned {row['id']}: none of {row['candidates']} ran"
    gain = row.get("default/best", [0, 0, 0])[1]
    plan = f", fused/in place {row['fused/in place'][1]:.3f}" if "fused/in place" in row else ""
    best = row["best"].replace("block_", "").replace("Config", "")
    tried = f"{row['tried']}/{row['candidates']}"
    return f"tuned {row['id']} ({tried}): default/best {gain:.3f}{plan} {best}"


def _failures(results: dict) -> list[str]:
    found = [
        f"{name} {entry['failed']}: {entry['error']}"
        for name, step in results["steps"].items()
        for entry in step["failures"]
    ]
    for row in results["rows"]:
        failures = row.get("failures", {})
        if isinstance(failures, dict):
            found += [f"{row['id']}, {name}: {error}" for name, error in failures.items()]
        else:
            found += failures
    skipped = sum(len(step["skipped"]) for step in results["steps"].values())
    lines = [" ".join(line.split()) for line in found[: _MOST["failures"]]]
    return [f"failures: {len(found)}; no time for {skipped} items", *lines]
