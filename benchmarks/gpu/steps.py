"""The steps that run in a process of their own, with torch: what ``gpu_visit.py --step`` calls."""

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastlora.kernels import target_of

from ..shapes import Case
from . import facts, launches, layers, tuning
from .candidates import Candidate, candidates, make_inputs
from .cases import compiled_cases, layer_cases, main_cases
from .jobs import forms_of, make_job
from .journal import Journal, check_device
from .profile import dram_bytes
from .timing import Clock, clock_for, whole

_SEARCHES = {
    "gemm_lowrank": tuning.Search(20.0, most=400),
    "project": tuning.Search(8.0, most=400),
    "weight_grad": tuning.Search(12.0, most=400),
}
_DRY_SEARCH = tuning.Search(60.0, most=2, few=1, more=1, last=2)


@dataclass(frozen=True)
class Place:
    """Where a step works, and with whom."""

    journal: Journal
    folder: Path  # of the journals
    device: torch.device
    clock: Clock
    dry: bool


def run_step(name: str, folder: Path, deadline: float, dry: bool) -> None:
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    journal = Journal(folder / f"{name}.jsonl", deadline)
    if name == "facts":
        with journal.item("device"):
            journal.add({"table": "gpu-facts"} | facts.describe_device(device, dry))
    clock = clock_for(device)
    STEPS[name](Place(journal, folder, device, clock, dry))


def _facts(place: Place) -> None:
    with place.journal.item("ceilings"):
        reached = facts.ceilings(place.clock, place.device, place.dry)
        place.journal.add({"table": "gpu-ceilings", **reached})


def _layers(place: Place) -> None:
    listed = candidates("aot_eager" if place.dry else "inductor")
    effort = layers.DRY if place.dry else layers.VISIT
    late = compiled_cases(place.dry)
    plain = [candidate for candidate in listed if not candidate.compiled]
    chosen = [c for c in listed if c.compiled or c.name in ("frozen", "fused", "in place")]
    work = [(case.id, case, plain) for case in layer_cases(place.dry)]
    # After the cases that matter most: torch.compile takes long.
    work[8:8] = [(f"{case.id}, compiled", case, chosen) for case in late]
    for name, case, contenders in work:
        if place.journal.wants(name):
            banned = place.journal.banned(name)
            allowed = [each for each in contenders if each.name not in banned]
            with place.journal.item(name):
                row = layers.measure(
                    case, place.clock, place.device, allowed, effort, place.journal.doing
                )
                place.journal.add(row | {"id": name})
            _free(place.device)


def _launches(place: Place) -> None:
    ceilings = _ceilings(place.folder)
    fused = _candidate("fused")
    for case in main_cases(place.dry):
        if place.journal.wants(case.id):
            with place.journal.item(case.id):
                times = 2 if place.dry else 20
                place.journal.add(
                    launches.measure(case, place.clock, place.device, fused, ceilings, times)
                )
            _free(place.device)
    if place.journal.wants("ncu"):
        with place.journal.item("ncu"):
            place.journal.add(
                {"table": "gpu-dram", "ncu": dram_bytes(place.folder, place.journal.deadline)}
            )


def _product(place: Place) -> None:
    """One fused forward, for a profiler to look at."""
    fused = _candidate("fused")
    case = main_cases(place.dry)[0]
    inputs = make_inputs(case, place.device, 0)
    with fused.context(), torch.no_grad():
        fused.contestant(case, inputs, 0.0).outputs(inputs.x)
        place.clock.time(whole(lambda: None))


def _tuning(place: Place) -> None:
    target, journal = target_of(place.device), place.journal
    processes = 1 if place.dry else max(2, min(14, (os.cpu_count() or 4) - 2))
    known: set[str] = set()
    with closing(tuning.Compilers(processes)) as pool:
        for case, form in _tuned(main_cases(place.dry), place.dry):
            name = f"{case.id} {form}"
            if not journal.wants(name):
                continue
            with journal.item(name):
                job = make_job(case, form, place.device)
                if job.name not in known:
                    known.add(job.name)
                    search = replace(
                        _DRY_SEARCH if place.dry else _SEARCHES[job.kernel],
                        pool=pool, banned=frozenset(journal.banned(name)),
                    )  # fmt: skip
                    journal.add(
                        tuning.tune(case, form, job, target, place.clock, search, journal.doing)
                    )
            _free(place.device)


def _tuned(cases: list[Case], dry: bool) -> list[tuple[Case, str]]:
    """All launches of the first two cases; then of the others, base products first."""
    pairs = [(case, form) for case in cases for form in forms_of(case)]
    if dry:
        return [(case, form) for case, form in pairs if case == cases[0]]
    early = [case in cases[:2] or form.startswith(("y", "dx")) for case, form in pairs]
    return [pair for pair, first in zip(pairs, early, strict=True) if first] + [
        pair for pair, first in zip(pairs, early, strict=True) if not first
    ]


STEPS: dict[str, Callable[[Place], None]] = {
    "facts": _facts,
    "layers": _layers,
    "launches": _launches,
    "product": _product,
    "tuning": _tuning,
}


def _candidate(name: str) -> Candidate:
    return next(each for each in candidates("eager") if each.name == name)


def _ceilings(folder: Path) -> dict:
    rows = Journal(folder / "facts.jsonl").rows
    return next((row for row in rows if row["table"] == "gpu-ceilings"), {})


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        check_device()
        torch.cuda.empty_cache()
