"""Which compiled kernels are believed on a device: what launches ask before a first use."""

import contextlib
import os
from collections.abc import Hashable, Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
import triton

from ...verdicts import Environment, Verdict, written
from .cover import kernels

VARIABLE = "FASTLORA_VERIFY"
FIRST, ALWAYS, OFF = "first", "always", "off"
_CHOSEN = os.environ.get(VARIABLE) or None
_verdicts: dict[tuple[str, Environment], Verdict] = {}


def mode(device: torch.device) -> str:
    """Whether kernels are judged there: FIRST, ALWAYS or OFF.

    Raises ValueError for another word in the variable.
    """
    if _CHOSEN not in (None, FIRST, ALWAYS, OFF):
        raise ValueError(f"{VARIABLE} is {_CHOSEN!r}, but must be {FIRST!r}, {ALWAYS!r} or {OFF!r}")
    # The interpreter, and a stand-in for a GPU, are for tests, which judge by themselves.
    return _CHOSEN or (FIRST if device.type == "cuda" else OFF)


@cache
def environment(device: torch.device) -> Environment:
    target = kernels.target_of(device)
    name, ptxas = "Triton's interpreter", ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    if target is not None and target.kind == "cuda":
        ptxas = ".".join(map(str, kernels.ptxas(int(target.arch))))
    return Environment(name, _driver(), triton.__version__, ptxas, torch.__version__)


def _driver() -> str:
    """Its version, or that of the CUDA or HIP that it speaks."""
    for path in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text(encoding="utf-8").strip()
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(version()) if version else "unknown"


def verdict(identities: Iterable[str], device: torch.device) -> bool | None:
    """Whether all of these kernels are believed; None: one has yet to be judged."""
    where = mode(device)
    if where == OFF:
        return True
    known = _known()
    here = environment(device)
    verdicts = [known.get((identity, here)) for identity in identities]
    if any(each is not None and each.fault for each in verdicts):
        return False
    return None if where == ALWAYS or not all(verdicts) or not verdicts else True


def settle(trial: Mapping[Hashable, "kernels.Resolved"], device: torch.device, fault: str) -> str:
    """Believe the kernels of a trial, or never use them again; the names of those that are meant.

    Of a call with a fault these are the kernels that no other call has proven.
    """
    here, known, always = environment(device), _known(), mode(device) == ALWAYS
    scripts = [record.script for record in trial.values() if record.script is not None]
    identities = sorted({identity for script in scripts for identity in script.identities})
    meant = [each for each in identities if always or (each, here) not in known]
    for identity in meant:
        one = known[identity, here] = Verdict(identity, here, fault)
        one.write()
    if fault:
        give_up(trial)
    elif not always:
        for record in trial.values():
            kernels.keep(record)
    return ", ".join(dict.fromkeys(known[each, here].name for each in meant)) or "of a call"


def give_up(trial: Mapping[Hashable, "kernels.Resolved"]) -> None:
    """Calls of these kinds run no kernels any more in this process."""
    for record in trial.values():
        kernels.keep(record._replace(script=None))


def _known() -> dict[tuple[str, Environment], Verdict]:
    if not _verdicts:
        _verdicts.update({(one.kernel, one.environment): one for one in written()})
    return _verdicts


kernels.use_judge(verdict)
