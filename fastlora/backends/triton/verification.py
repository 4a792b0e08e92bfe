"""Verification of compiled kernels: PyTorch's operations check their results before a first use.

:func:`run_kernels` looks a call up in a cache.  The call is in one of three states:

* captured: it replays;
* refused: its kernels were wrong or don't cover it, and the call runs on PyTorch;
* unverified: its kernels have not been compared with PyTorch on this device yet.

An unverified call runs with the kernels and with PyTorch, first on random numbers and then on the
caller's own tensors.  The random numbers replace all operands except packed weights and integers.
If all results agree, the kernels run from then on.  If not, or if a kernel doesn't compile, the
caller gets PyTorch's result and a warning, and the kernels are refused.

The outcome holds for one kernel's code on one kind of device, with one version of the driver,
Triton, ptxas and torch.  Each outcome has its own file in the user's cache, so processes that
verify at the same time lose nothing.  If no file can be written, each process verifies for itself.

``FASTLORA_VERIFY``: "first", the default on a GPU; "always", each call; "off".
"""

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ... import cache as files
from ...blocks import slices
from ...formats.format import Quantized
from ...formats.rotated_int8 import RotatedInt8
from ...projection import Adapter, Base, Layout, Output, flatten, unflatten
from .. import torch as torch_backend
from ..protocol import BackwardCall, Call
from .cover import kernels, user_level

# Looked up once, because every call needs them.
plan, replay, target = kernels.plan, kernels.replay, kernels.target
_CapturedCall = kernels.CapturedCall
Run = Callable[[Sequence], Any]  # takes tensors; returns a list of results, or a State

VARIABLE = "FASTLORA_VERIFY"
FIRST, ALWAYS, OFF = "first", "always", "off"
_CHOSEN = os.environ.get(VARIABLE) or None
_FOLDER, _FIELDS = "verification", ("kernel", "environment", "fault")  # of the files

# The number of runs on equal tensors, whose results must be bit-identical.  A fault that occurs in
# a third of all runs passes 16 runs with probability 0.0015.
REPEATS = 16
# The allowed error, in multiples of PyTorch's own error.  It isn't 1, because the kernels add in
# another order.
_SLACK = 8.0
_FEW = 32  # the least rows or columns from which an error can be estimated
_BLOCK = 2**21  # elements in one comparison
_SEED = 12
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
# The role of a tensor.  Random numbers replace rows, biases and factors (weights and adapters),
# because zeros (a new lora_b, adaLN-zero) and NaN hide a wrong kernel.  Integers, such as the
# classes of a loss, and packed weights aren't replaced.  If a packed weight is zero or not finite,
# the call runs on PyTorch and its kernels stay unverified.  Each such call unpacks the weight, to
# check it again.
#
# The x of 8-bit products ("exact") becomes numbers whose rotation is exact in every order of sums.
# Both backends then round it to the same codes, and all integer sums must be equal.  The caller's
# own numbers may get another code here and there; a result then differs by one step.
_ROWS, _FACTOR, _KEPT, _EXACT = "rows", "factor", "kept", "exact"
_STEP = 2.0**-8  # the rounding that one code of a row explains, relative to the row's results


class State(str):
    """The reason why a call's kernels don't run.  It is returned in place of their results."""


UNVERIFIED = State("a kernel has not been compared with PyTorch on this device")
REFUSED = State("a kernel was wrong, or the kernels don't cover the call: PyTorch runs it")


class _Unverified(NamedTuple):
    """A captured call in a cache whose kernels are unverified, so that it may not replay yet."""

    call: "kernels.CapturedCall"


# (a kernel's name and the hash of its code, environment) -> its fault, or "" if it is right
Records = dict[tuple[str, str], str]
_records: Records = {}
# ``_here.trial``, while this thread verifies a call: the captured calls that the call consists of,
# with their caches and keys.
_here = threading.local()
Trial = dict[Hashable, tuple[dict, Hashable, "kernels.CapturedCall"]]


def run_kernels(
    function: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    settings: tuple[Hashable, ...],
    covers: Callable[[], bool],
    calls: dict | None = None,
) -> list[Any] | State:
    """The results of ``function(tensors, *settings)``, or a State if the kernels can't run it.

    The function may use torch's operations and the kernels' launchers.  It may depend on the
    settings and on all facts of the tensors, but not on their elements.  All tensors are on one
    device, which is the current one while the function runs.  ``covers`` is called for a new kind
    of call, and says whether the kernels cover it.  ``calls`` is a cache for calls whose tensors
    have the same facts, so that its keys need no facts.  Raises RuntimeError for a new kind of call
    inside a CUDA graph's capture.
    """
    key: Hashable = (function, settings, plan.forced, plan.edition, target.forced)
    if calls is None:
        calls = replay.calls
        key = (key, replay.device_of(tensors), *map(replay.facts_of, tensors))
    call = calls.get(key)
    is_captured = type(call) is _CapturedCall
    if not is_captured or replay.is_observed():
        device = replay.device_of(tensors)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            if call is None and not covers():
                return REFUSED
            may_run = is_captured or (call is None and mode(device) == OFF)
            if kernels.launch.interceptor or (may_run and replay.is_observed()):
                return list(function(tensors, *settings))
            if not is_captured:
                call = _lookup(function, tensors, settings, calls, key)
        if isinstance(call, State):
            return call
    return replay.replay_call(call, tensors)


def _lookup(
    function: Callable, tensors: Sequence, settings: tuple, calls: dict, key: Hashable
) -> "kernels.CapturedCall | State":
    """A captured call that may replay, or UNVERIFIED, or REFUSED.

    While this thread verifies a call, an unverified call may replay also.
    """
    entry, device = calls.get(key), replay.device_of(tensors)
    trial: Trial | None = getattr(_here, "trial", None)
    if isinstance(entry, State):
        return entry
    if trial is None and replay.is_in_graph_capture(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and no call of this kind has run before: kernels "
            "are compiled, loaded and verified outside of a capture. Run the same step once "
            "before it"
        )
    if entry is None:
        try:
            entry = _Unverified(kernels.capture_call(function, tensors, settings))
        except Exception as error:
            if mode(device) == OFF:
                raise
            replay.remember(calls, key, REFUSED)
            _warn_of_fault("of a call", device, f"{type(error).__name__}: {error}")
            return REFUSED
        replay.remember(calls, key, entry)
    call, here = entry.call, environment(device)
    faults = [_known().get((identity, here)) for identity in call.identities]
    if mode(device) == OFF or (mode(device) == FIRST and all(fault == "" for fault in faults)):
        replay.remember(calls, key, call)
    elif any(faults):
        replay.remember(calls, key, REFUSED)
        return REFUSED
    elif trial is None:
        return UNVERIFIED
    else:
        trial[id(calls), key] = calls, key, call
    return call


def mode(device: torch.device) -> str:
    """FIRST, ALWAYS or OFF.  Raises ValueError for any other text in the variable."""
    if _CHOSEN not in (None, FIRST, ALWAYS, OFF):
        raise ValueError(f"{VARIABLE} is {_CHOSEN!r}, but must be {FIRST!r}, {ALWAYS!r} or {OFF!r}")
    # Off without a GPU, because kernels then run only in tests, which compare results themselves.
    return _CHOSEN or (FIRST if device.type == "cuda" else OFF)


@cache
def environment(device: torch.device) -> str:
    """The device and the versions that an outcome holds for."""
    gpu, name, ptxas = kernels.target_of(device), "Triton's interpreter", ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    if gpu is not None and gpu.kind == "cuda":
        ptxas = ", ptxas " + ".".join(map(str, kernels.ptxas(int(gpu.arch))))
    versions = f"driver {_driver()}, Triton {triton.__version__}{ptxas}, torch {torch.__version__}"
    return f"{name} ({versions})"


def _driver() -> str:
    """The driver's version, or the newest version of CUDA or HIP that the driver supports."""
    for path in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text(encoding="utf-8").strip()
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(version()) if version else "unknown"


def read_records() -> Records:
    """The outcomes of all processes of this user.  A file that isn't a full record is skipped."""
    records: Records = {}
    for text in files.read(files.cache_folder() / _FOLDER, "*.json").values():
        # RecursionError: a file with too many nested brackets.
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            record = json.loads(text)
            kernel, where, fault = [record[name] for name in _FIELDS]
            if all(isinstance(word, str) for word in (kernel, where, fault)) and kernel.split():
                records[kernel, where] = fault
    return records


def _known() -> Records:
    """All outcomes.  The first use reads the files."""
    if not _records:
        _records.update(read_records())
    return _records


def _settle(trial: Trial, device: torch.device, fault: str) -> str:
    """Record a trial's outcome for its kernels that have none yet, and return their names."""
    here, known, always = environment(device), _known(), mode(device) == ALWAYS
    identities = sorted({each for _, _, call in trial.values() for each in call.identities})
    new = [each for each in identities if always or (each, here) not in known]
    for identity in new:
        known[identity, here] = fault
        name = sha256(f"{identity}\n{here}".encode()).hexdigest()[:32]
        text = json.dumps(dict(zip(_FIELDS, (identity, here, fault), strict=True)), indent=1)
        files.write(files.cache_folder() / _FOLDER / f"{name}.json", text + "\n")
    if fault:
        _refuse(trial)
    return ", ".join(dict.fromkeys(identity.split()[0] for identity in new)) or "of a call"


def _refuse(trial: Trial) -> None:
    """Make calls of the trial's kinds run on PyTorch for the rest of this process."""
    for calls, key, _ in trial.values():
        replay.remember(calls, key, REFUSED)


def _warn_of_fault(names: str, device: torch.device, fault: str) -> None:
    _warn(
        f"the Triton kernels {names} no longer run on {environment(device)}, and PyTorch's "
        f"operations run instead: {fault}. Please report it, with the output of `python -m "
        "fastlora doctor`"
    )


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=user_level())


def forward(
    state: State, run: Callable, inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """A forward whose kernels are unverified or refused; ``run`` is the kernels' forward."""
    of = partial(of_forward, seeds=seeds)
    results = _verified(state, of, run, torch_backend.forward, inputs, call)
    return results[: len(call.layouts)], results[len(call.layouts) :]


def of_forward(forward: Callable, seeds: Tensor | None, call: Call) -> Run:
    """A function of a call's inputs that runs a backend's forward and returns every y and h."""

    def run(tensors: Sequence) -> list | State:
        made = forward(tensors, seeds, call)
        return made if isinstance(made, State) else [*made[0], *made[1]]

    return run


def backward(state: State, run: Callable, given: BackwardCall) -> list[Tensor | None]:
    """A backward whose kernels are unverified or refused; ``run`` is the kernels' backward."""
    tensors = [*given.inputs, *given.hs, *given.dys]
    of = partial(of_backward, given=given)
    return _verified(state, of, run, torch_backend.backward, tensors, given.call)


def of_backward(backward: Callable, given: BackwardCall, call: Call) -> Run:
    """A function of inputs, hs and dys that runs a backend's backward, for every gradient."""
    first_h, first_dy = len(given.needs), -len(call.layouts)

    def run(tensors: Sequence) -> list | State:
        hs = tensors[first_h:first_dy]
        inputs, dys = tensors[:first_h], tensors[first_dy:]
        return backward(given._replace(dys=dys, inputs=inputs, hs=hs, call=call))

    return run


def elementwise(run: Run, by_torch: Run, matrices: Sequence[Tensor], fills: int = 0) -> list:
    """The kernels' results ``run(matrices)``, verified; PyTorch's ``by_torch(matrices)`` if wrong.

    With ``fills``, both functions fill this many of the last matrices instead.
    """
    made = run(matrices)
    if not isinstance(made, State):
        return made
    if made is REFUSED:
        return by_torch(matrices)
    read, filled = matrices[: len(matrices) - fills], matrices[len(matrices) - fills :]

    def of(function: Run, call: None) -> Run:
        def fill_new(tensors: Sequence) -> list | State:
            # In x's dtype where that is wider, as in the exact run of :func:`compared`.
            dtypes = [torch.promote_types(tensors[0].dtype, each.dtype) for each in filled]
            new = [torch.empty_like(m, dtype=d) for m, d in zip(filled, dtypes, strict=True)]
            made = function([*tensors, *new])
            return made if isinstance(made, State) else new or made

        return fill_new

    results = _verified(made, of, run, by_torch, read)
    # Not earlier, because a matrix may be both read and filled.
    for matrix, result in zip(filled, results, strict=False):
        matrix.copy_(result)
    return results


def _roles(layouts: Sequence[Layout]) -> list[str]:
    """The role of each of a call's inputs."""
    outputs = [
        Output(
            Base(_FACTOR if layout.format is None else _KEPT, _ROWS),
            tuple([Adapter(_FACTOR, _FACTOR, scale) for scale in layout.scales]),
        )
        for layout in layouts
    ]
    is_int8 = any([isinstance(layout.format, RotatedInt8) for layout in layouts])
    return [_EXACT if is_int8 else _ROWS, *flatten(outputs, layouts)]


def _probe_of_call(call: Call, count: int) -> Call:
    """The call with 1 in place of zero scales, and its ``count`` rows spread evenly over experts.

    Zero scales and empty segments would hide a wrong kernel.
    """
    layouts = tuple([layout._replace(scales=_not_zero(layout.scales)) for layout in call.layouts])
    rows = call.rows
    if rows is not None and rows.numbers is not None:
        rows = rows._replace(numbers=rows.numbers._replace(scales=_not_zero(rows.numbers.scales)))
    elif rows is not None:
        experts = torch.arange(1, len(rows.ends) + 1, dtype=torch.int64, device=rows.ends.device)
        ends = (experts * count // len(rows.ends)).to(rows.ends.dtype)
        rows = rows._replace(ends=ends, shares=None)
    return call._replace(layouts=layouts, rows=rows)


def _not_zero(scales: Sequence[float]) -> tuple[float, ...]:
    return tuple([scale or 1.0 for scale in scales])


def _verified(
    state: State,
    of: Callable[..., Run],
    run: Callable,
    torch_run: Callable,
    tensors: Sequence[Tensor | None],
    call: Call | None = None,
) -> list:
    """The kernels' results for the tensors if the kernels are right; otherwise PyTorch's.

    ``of(run, call=…)`` makes a function of the tensors from ``run`` or ``torch_run`` and a call.
    """
    by_kernels, by_torch = of(run, call=call), of(torch_run, call=call)
    if state is REFUSED:
        return by_torch(tensors)
    x, roles, packed, probe_call = tensors[0], list[str](), list[Any](), call
    assert x is not None
    with _disable_current_modes(), torch.no_grad():
        if call is not None:
            roles, probe_call = _roles(call.layouts), _probe_of_call(call, len(x))
            outputs = unflatten(tensors[1 : len(roles)], call.layouts)
            packed = [o.base.weight for o in outputs if isinstance(o.base.weight, Quantized)]
        rest = tensors[len(roles) :]
        roles += [_ROWS if t is None or t.is_floating_point() else _KEPT for t in rest]
        right, results, fault = by_torch(tensors), list[Any](), None
        _here.trial = trial = Trial()
        try:
            if all(_is_comparable([weight.dense(x.dtype)]) for weight in packed):
                of_probe = of(run, call=probe_call), of(torch_run, call=probe_call)
                fault = _fault_of_probe(*of_probe, _probe(tensors, roles), roles)
            if fault == "":
                results = by_kernels(tensors)
            if fault is None or isinstance(results, State):
                return right
            step = _STEP if _EXACT in roles else 0.0
            fault = fault or compared(by_torch, tensors, roles, results, right, step)
        except torch.OutOfMemoryError:
            _refuse(trial)
            _warn(
                "there isn't enough memory to verify Triton kernels: calls of this kind run on "
                "PyTorch's operations in this process"
            )
            return right
        except Exception as error:  # such as an error of the driver
            fault = f"{type(error).__name__}: {error}"
        finally:
            _here.trial = None
    names = _settle(trial, x.device, fault)
    if not fault:
        return results
    _warn_of_fault(names, x.device, fault)
    return right


def _fault_of_probe(by_kernels: Run, by_torch: Run, probe: Sequence, roles: list) -> str | None:
    """The kernels' fault on random numbers, or ""; None if the kernels can't be verified."""
    right = by_torch(probe)
    results = by_kernels(probe) if _is_comparable(right) else UNVERIFIED
    if isinstance(results, State):
        return None
    for _ in range(REPEATS - 1):
        if not all(map(_same_bits, results, by_kernels(probe))):
            return f"two calls of {REPEATS} with the same tensors made other bits"
    return compared(by_torch, probe, roles, results, right)


def _is_comparable(results: Sequence[Tensor | None]) -> bool:
    """Whether every result is finite, and none is zero everywhere."""
    made = [result for result in results if result is not None]
    return all(bool(each.isfinite().all()) and bool(each.any()) for each in made)


def _probe(tensors: Sequence[Tensor | None], roles: Sequence[str]) -> list[Tensor | None]:
    """Random tensors in place of these, except tensors with the role _KEPT."""
    made: list[Tensor | None] = []
    for tensor, role in zip(tensors, roles, strict=True):
        if tensor is None or role == _KEPT or not tensor.numel():
            made.append(tensor)
            continue
        # With these deviations, all terms of a result have a similar size.
        spread = tensor.shape[-1] ** -0.5 if role == _FACTOR else 1.0
        generator = torch.Generator(tensor.device).manual_seed(_SEED + len(made))
        new = torch.empty_like(tensor).normal_(0, spread, generator=generator)
        made.append(new.copy_(_exact_rows(new.shape, generator)) if role == _EXACT else new)
    return made


def _exact_rows(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Rows of small whole numbers times a power of 2, whose rotation is exact in every dtype."""
    options: Any = {"generator": generator, "device": generator.device}
    rows = torch.arange(shape[0], dtype=torch.float32, device=generator.device)
    powers = rows.remainder(4).exp2()
    return torch.randint(-2, 3, tuple(shape), **options) * powers[:, None]


def compared(
    by_torch: Run,
    tensors: Sequence[Tensor | None],
    roles: Sequence[str],
    results: Sequence,
    right: Sequence,
    step: float = 0.0,
) -> str:
    """The fault of the kernels' ``results``, or "".

    ``right``: PyTorch's results.  Their errors determine the allowed errors.  ``step``: a relative
    error to allow, if the rounding of x's dtype is smaller.
    """
    x = tensors[0]
    assert x is not None
    # PyTorch's results in a wider dtype count as exact.  (Its float64 isn't of 8 bits.)
    truth, pairs = None, zip(tensors, roles, strict=True)
    if x.dtype != torch.float32 or _EXACT not in roles:
        with contextlib.suppress(torch.OutOfMemoryError):
            wide = _WIDE[x.dtype]
            truth = by_torch([t if t is None or role == _KEPT else t.to(wide) for t, role in pairs])
    for i, (ours, its) in enumerate(zip(results, right, strict=True)):
        name = f"result {i + 1} of {len(right)}"
        if ours is None or its is None:  # a gradient that is zero may be left out
            made = its if ours is None else ours
            if made is not None and torch.count_nonzero(made):
                return f"{name} is missing"
        elif its.numel():
            exact = None if truth is None else _as_matrix(truth[i])
            eps = max(step, torch.finfo(x.dtype).eps)
            share = _worst(_as_matrix(ours), _as_matrix(its), exact, eps)
            if not share <= 1:
                shape = f"{name}, {list(its.shape)}"
                return f"{shape}, has an error of {share:.3g} times what rounding explains"
    return ""


def _worst(ours: Tensor, its: Tensor, truth: Tensor | None, eps: float) -> float:
    """The largest ratio of an element's error to the error that is allowed for it.

    The allowed error is _SLACK · min(row, column) plus one rounding, where row and column are
    PyTorch's largest errors in the element's row and in its column.  So large numbers in one row or
    column can't hide an error in another one.  Without ``truth``, PyTorch's results replace it,
    with an assumed error of one rounding.  Elements where PyTorch's result isn't finite are
    skipped.
    """
    matrices = ours, its, its if truth is None else truth
    of_rows, of_columns = [], torch.zeros(2, its.shape[1], dtype=torch.float64, device=its.device)
    for _, it, true in _blocks(*matrices):
        sizes = torch.stack([(it - true).abs(), true.abs()]).nan_to_num(0.0, 0.0)
        of_rows.append(sizes.amax(2))
        of_columns = torch.maximum(of_columns, sizes.amax(1))
    rows_in_all = torch.cat(of_rows, 1)
    if its.shape[0] < _FEW:  # too few rows to estimate a column's error
        of_columns = torch.full_like(of_columns, torch.inf)
    if its.shape[1] < _FEW:
        rows_in_all = rows_in_all.amax(1, keepdim=True).expand_as(rows_in_all)
    worst, first = 0.0, 0
    for our, it, true in _blocks(*matrices):
        of_block = rows_in_all[:, first : first + len(it), None]
        error, size = torch.minimum(of_block, of_columns[:, None])
        allowed = _SLACK * error + 2 * eps * size
        if truth is None:
            allowed += _SLACK * eps * size
        away = torch.where(it.isfinite() & true.isfinite(), (our - true).abs(), 0.0)
        share = torch.where(away == 0, 0.0, away / allowed)
        worst, first = max(worst, share.nan_to_num(torch.inf).amax().item()), first + len(it)
    return worst


def _blocks(*matrices: Tensor) -> Iterator[list[Tensor]]:
    """Yield blocks of rows of all matrices, in float64.  Whole matrices would take more memory."""
    for rows in slices(len(matrices[0]), _BLOCK // matrices[0].shape[1]):
        yield [matrix[rows].double() for matrix in matrices]


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.view(1, -1)


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))
