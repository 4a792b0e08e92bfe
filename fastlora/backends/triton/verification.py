"""Verification of compiled kernels: PyTorch's operations check their results before a first use.

:func:`run_kernels` looks up the kind of the call in a cache.  The entry is one of three:

* a captured call: its launches are replayed;
* REFUSED: its kernels have a fault or don't compile, and PyTorch's operations run the call;
* none: the call is captured.  If its kernels weren't verified on this device yet, they are now.

Verification runs the call with the kernels and with PyTorch, first on random numbers (the *probe*)
and then on the caller's own tensors.  The random numbers replace all operands except packed weights
and integers.  If all results agree, the kernels run from then on.  If not, or if a kernel doesn't
compile, the caller gets PyTorch's result and a warning, and the kernels are refused.

The outcome holds for one kernel's code on one kind of device, with one version of the driver,
Triton, ptxas and torch.  Each outcome has its own file in the user's cache, so processes that
verify at the same time lose nothing.  If no file can be written, each process verifies for itself.

``FASTLORA_VERIFY``: "first", the default on a GPU; "always", each call; "off".
"""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Hashable, Sequence, Set
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...call.projection import Adapter, Base, Layout, Output, flatten, unflatten
from ...common import cache_folder as files
from ...common.remembered import remember
from ...common.row_blocks import slices
from ...formats.format import Quantized
from .supported import kernels, user_level

# Looked up once, because every call needs them.
plan, replay, target = kernels.plan, kernels.replay, kernels.target
_CapturedCall = kernels.CapturedCall
Run = Callable[[Sequence], list]  # takes tensors, and returns results

VARIABLE = "FASTLORA_VERIFY"
FIRST, ALWAYS, OFF = "first", "always", "off"
_CHOSEN = os.environ.get(VARIABLE) or None
# The folder of the files with outcomes, and the fields of such a JSON file.
_FOLDER, _FIELDS = "verification", ("kernel", "environment", "fault")

# The number of runs on equal tensors, whose results must be bit-identical.  A fault that occurs in
# a third of all runs passes 16 runs with probability 0.0015.
REPEATS = 16
# The allowed error, in multiples of PyTorch's own error.  It isn't 1, because the kernels add in
# another order.
_SLACK = 8.0
_FEW = 32  # a row's error is estimated from at least so many elements
_BLOCK = 2**21  # elements in one comparison
_SEED = 12
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
# The role of a tensor says what replaces it for verification:
#
#   rows    random numbers, standard deviation 1: x, dy, h and biases
#   factor  random numbers, standard deviation (columns) ** -0.5: weights and adapters
#   exact   the x of 8-bit products: numbers whose rotation has no rounding error (_exact_rows).
#           A rotation multiplies each 64 columns by a Hadamard matrix (formats/rotated_int8.py)
#   ends    the ends of experts: segments of equal length
#   kept    nothing: packed weights, and other integers, such as the classes of a loss
#
# Zeros (a new lora_b, adaLN-zero), NaN and empty segments would hide a wrong kernel.  So if a scale
# is zero, or a packed weight is zero or not finite, the call runs on PyTorch, and its kernels stay
# unverified.  Each such call checks again.
#
# With "exact", kernels and PyTorch round x to equal int8 codes, so their integer sums must be
# equal.  With the caller's own x, rounding errors of the rotation may change a code by 1.  Then a
# result may differ by _STEP.
_ROWS, _FACTOR, _ENDS, _KEPT, _EXACT = "rows", "factor", "ends", "kept", "exact"
_STEP = 2.0**-8  # allowed relative error of a result if one code of its row differs by 1


REFUSED = "refused"  # in a cache, in place of a captured call: PyTorch runs calls of this kind
# How often this process ran PyTorch's function in place of kernels, for measurements of kernels.
fallbacks = 0
# (a kernel's name and the hash of its code, environment) -> its fault, or "" if it is right
Records = dict[tuple[str, str], str]
_records: Records = {}


class KernelFunction(NamedTuple):
    """A function by kernels, and the same function by PyTorch.

    ``run``, ``by_torch`` and ``covers`` are called with (tensors, *settings).  ``run`` may use
    torch's operations and the kernels' launchers.  It may depend on the settings and on all facts
    of the tensors, but not on their elements.
    """

    run: Callable[..., Sequence[Tensor | None]]
    by_torch: Callable[..., Sequence[Tensor | None]]
    covers: Callable[..., bool]  # whether the kernels cover a new kind of call
    # Whether settings[0] is the outputs' layouts.  Then tensors are [x, *outputs' tensors, …], and
    # a later int32 tensor is the ends of experts.
    has_layouts: bool = False
    writes: tuple[int, ...] = ()  # indices of the tensors that the functions write to
    most_rows: int = 0  # if not 0, verify at most this many rows at a time, to save memory


def run_kernels(
    function: KernelFunction,
    tensors: Sequence[Tensor | None],
    settings: tuple[Hashable, ...],
    calls: dict | None = None,
) -> list[Any]:
    """The results of ``function``, by its kernels, or by PyTorch where they can't compute them.

    All tensors are on one device, which is the current one while the function runs.  ``calls`` is
    the caller's cache for tensors with equal facts, so its keys leave the facts out.  Raises
    RuntimeError for a new kind of call inside a CUDA graph's capture.
    """
    # The launches also depend on the plans: measured ones (``edition`` counts their changes), and
    # plans or targets that tests and benchmarks force.
    key: Hashable = (function.run, settings, plan.forced, plan.edition, target.forced)
    if calls is None:
        calls = replay.calls
        key = (key, replay.device_of(tensors), *map(replay.facts_of, tensors))
    call = calls.get(key)
    if type(call) is _CapturedCall and not replay.is_observed():
        return replay.replay_call(call, tensors)
    device = replay.device_of(tensors)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if call is REFUSED or (call is None and not function.covers(tensors, *settings)):
            return _fall_back(function, tensors, settings)
        # An interceptor, or a profiler of launches, must see launches.  A replay hides them, so run
        # the function itself, but for a profiler only kernels that are verified.
        may_run = call is not None or mode(device) == OFF
        if kernels.launch.interceptor or (may_run and replay.is_observed()):
            return list(function.run(tensors, *settings))
        return _run_new(function, tensors, settings, calls, key)


def _run_new(
    function: KernelFunction, tensors: Sequence, settings: tuple, calls: dict, key: Hashable
) -> list[Any]:
    """The results of a call that isn't in the cache."""
    device = replay.device_of(tensors)
    if replay.is_in_graph_capture(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and no call of this kind has run before: kernels "
            "are compiled, loaded and verified outside of a capture. Run the same step once "
            "before it"
        )
    when, setup = mode(device), environment(device)
    try:
        call = kernels.capture_call(function.run, tensors, settings)
    except Exception as error:
        if when == OFF:
            raise
        remember(calls, key, REFUSED)
        _warn_of_fault("of a call", device, f"{type(error).__name__}: {error}")
        return _fall_back(function, tensors, settings)
    # For each kernel: "" if it is right, a text for a fault, None if it wasn't verified.
    faults = [_known().get((identity, setup)) for identity in call.identities]
    if when == OFF or (when == FIRST and all(fault == "" for fault in faults)):
        remember(calls, key, call)
        return replay.replay_call(call, tensors)
    if any(faults):
        remember(calls, key, REFUSED)
        return _fall_back(function, tensors, settings)
    # Verify a block of rows at a time.  Such a function writes to its tensors and returns nothing.
    if 0 < function.most_rows < len(tensors[0]):
        for rows in slices(len(tensors[0]), function.most_rows):
            run_kernels(function, [t if t is None else t[rows] for t in tensors], settings)
        return []
    results, fault = _verified(function, call, tensors, settings)
    if fault:
        remember(calls, key, REFUSED)
    elif fault == "" and when == FIRST:
        remember(calls, key, call)
    return results


def _fall_back(function: KernelFunction, tensors: Sequence, settings: tuple) -> list[Any]:
    """The results by PyTorch, counted in ``fallbacks``."""
    global fallbacks
    fallbacks += 1
    return list(function.by_torch(tensors, *settings))


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
    """The outcomes that all processes of this user have written.  Invalid files are skipped."""
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
    """All outcomes that this process knows.  The first call reads the files."""
    if not _records:
        _records.update(read_records())
    return _records


def _record(identities: Set[str], device: torch.device, fault: str) -> str:
    """Record the outcome of kernels that have none yet, and return their names.

    ``identities``: "name hash" of each kernel.  The text "of a call" stands for no name.
    """
    setup, records, always = environment(device), _known(), mode(device) == ALWAYS
    new = [each for each in sorted(identities) if always or (each, setup) not in records]
    for identity in new:
        records[identity, setup] = fault
        name = sha256(f"{identity}\n{setup}".encode()).hexdigest()[:32]
        text = json.dumps(dict(zip(_FIELDS, (identity, setup, fault), strict=True)), indent=1)
        files.write(files.cache_folder() / _FOLDER / f"{name}.json", text + "\n")
    return ", ".join(dict.fromkeys(identity.split()[0] for identity in new)) or "of a call"


def _warn_of_fault(names: str, device: torch.device, fault: str) -> None:
    _warn(
        f"the Triton kernels {names} no longer run on {environment(device)}, and PyTorch's "
        f"operations run instead: {fault}. Please report it, with the output of `python -m "
        "fastlora doctor`"
    )


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=user_level())


def _verified(
    function: KernelFunction, call: "kernels.CapturedCall", tensors: Sequence, settings: tuple
) -> tuple[list, str | None]:
    """(results, fault) of a call's kernels.  With a fault, the results are PyTorch's.

    The fault is "" if the kernels are right, and None if nothing could be compared.
    """
    written = [i for i in function.writes if tensors[i] is not None]

    def on_copies(run: Callable, given: Sequence, *settings: Hashable) -> list:
        """The results of ``run``, and copies of the tensors that it writes to."""
        given = list(given)
        for i in written:
            given[i] = _alike(given[i]).copy_(given[i])
        return [*run(given, *settings), *[given[i] for i in written]]

    def by_torch(given: Sequence) -> list:
        return on_copies(function.by_torch, given, *settings)

    replayed, identities, fault = partial(replay.replay_call, call), set(call.identities), None
    with _disable_current_modes(), torch.no_grad():
        results, roles = by_torch(tensors), _roles(function, tensors, settings)
        # Two comparisons: on the probe, then on the caller's tensors.
        try:
            if not _hides_faults(function, tensors, settings):
                probe = _probe(tensors, roles)
                fault = _fault_of_probe(partial(on_copies, replayed), by_torch, probe, roles)
            if fault == "":
                kernel_results = on_copies(replayed, tensors)
                step = _STEP if _EXACT in roles else 0.0
                fault = compared(by_torch, tensors, roles, kernel_results, results, step)
                results = results if fault else kernel_results
        except torch.OutOfMemoryError:
            fault, identities = "there isn't enough memory to compare results", set()
            _warn(
                "there isn't enough memory to verify Triton kernels: calls of this kind run on "
                "PyTorch's operations in this process"
            )
        except Exception as error:  # such as an error of the driver
            fault = f"{type(error).__name__}: {error}"
        if fault is not None and identities:
            names = _record(identities, tensors[0].device, fault)
            if fault:
                _warn_of_fault(names, tensors[0].device, fault)
        # The runs above wrote to copies, because they also read these tensors.  Write the results
        # to the caller's tensors now.
        count = len(results) - len(written)
        for i, values in zip(written, results[count:], strict=True):
            tensors[i].copy_(values)
        return results[:count], fault


def _roles(function: KernelFunction, tensors: Sequence, settings: tuple) -> list[str]:
    """The role of each tensor: first x and the outputs' tensors by the layouts, then the others."""
    roles = list[str]()
    if function.has_layouts:
        layouts: Sequence[Layout] = settings[0]
        outputs = [
            Output(
                Base(_FACTOR if layout.format is None else _KEPT, _ROWS),
                tuple([Adapter(_FACTOR, _FACTOR, scale) for scale in layout.scales]),
            )
            for layout in layouts
        ]
        is_int8 = any(
            [each.format is not None and each.format.product == "int8" for each in layouts]
        )
        roles = [_EXACT if is_int8 else _ROWS, *flatten(outputs, layouts)]
    for tensor in tensors[len(roles) :]:
        if tensor is not None and tensor.dtype == torch.int32 and function.has_layouts:
            roles.append(_ENDS)
        elif tensor is None or not tensor.is_floating_point():
            roles.append(_KEPT)
        else:
            # 3 dimensions: a bank, the stacked lora_a or lora_b of many adapters.
            roles.append(_FACTOR if tensor.dim() == 3 else _ROWS)
    return roles


def _hides_faults(function: KernelFunction, tensors: Sequence, settings: tuple) -> bool:
    """Whether a scale is zero, or a packed weight is zero or not finite."""
    outputs = unflatten(tensors[1:], settings[0]) if function.has_layouts else []
    weights = [output.base.weight for output in outputs]
    dense = [w.dense(tensors[0].dtype) for w in weights if isinstance(w, Quantized)]
    has_zero = any([adapter.scale == 0 for output in outputs for adapter in output.adapters])
    return has_zero or not _is_comparable(dense)


def _fault_of_probe(by_kernels: Run, by_torch: Run, probe: Sequence, roles: list) -> str | None:
    """The kernels' fault on the probe, or ""; None if nothing can be compared."""
    # Two questions: does every run give the same bits, and are the results right?
    expected = by_torch(probe)
    if not _is_comparable(expected):
        return None
    results = by_kernels(probe)
    for _ in range(REPEATS - 1):
        if not all(map(_same_bits, results, by_kernels(probe))):
            return f"two calls of {REPEATS} with the same tensors made other bits"
    return compared(by_torch, probe, roles, results, expected)


def _is_comparable(results: Sequence[Tensor | None]) -> bool:
    """Whether every result is finite, and none is zero everywhere."""
    tensors = [result for result in results if result is not None]
    return all(bool(tensor.isfinite().all()) and bool(tensor.any()) for tensor in tensors)


def _alike(tensor: Tensor, spread: float = 0.0, generator: Any = None) -> Tensor:
    """A tensor of random numbers with the same strides, so that one captured call takes both."""
    steps = [(n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)]
    memory = tensor.new_zeros(max(0, sum(steps)) + 1)
    if spread:  # fill the memory, not the view, because elements of the view may overlap
        memory.normal_(0.0, spread, generator=generator)
    return memory.as_strided(tensor.shape, tensor.stride())


def _probe(tensors: Sequence, roles: Sequence[str]) -> list[Tensor | None]:
    """Random tensors in place of these, by their roles; the same ones in every process."""
    probe: list[Tensor | None] = []
    for tensor, role in zip(tensors, roles, strict=True):
        if tensor is None or role == _KEPT or not tensor.numel():
            probe.append(tensor)
            continue
        # Segments of equal length: ends[i] = (i + 1) · rows // segments.
        if role == _ENDS:
            numbers = torch.arange(1, len(tensor) + 1, dtype=torch.int64, device=tensor.device)
            probe.append((numbers * len(tensors[0]) // len(tensor)).to(tensor.dtype))
            continue
        # With these standard deviations, all terms of a result have a similar size.
        spread = tensor.shape[-1] ** -0.5 if role == _FACTOR else 1.0
        generator = torch.Generator(tensor.device).manual_seed(_SEED + len(probe))
        new = _alike(tensor, spread, generator)
        probe.append(new.copy_(_exact_rows(new.shape, generator)) if role == _EXACT else new)
    return probe


def _exact_rows(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Rows of integers from -2 to 2, times a power of 2 for each row.

    The rotation of such a row has no rounding error, in any dtype and any order of its sums.
    """
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

    ``right``: PyTorch's results in the same dtype.  ``truth``, below: PyTorch's results in a wider
    dtype, which count as exact.  |right - truth| determines the error that kernels may have
    (:func:`_worst`), with eps = max(step, eps of x's dtype).
    """
    x = tensors[0]
    assert x is not None
    # There is no truth for 8-bit products of a float32 x, because in float64 PyTorch doesn't round
    # to 8 bits, nor if the wide tensors don't fit in memory.
    truth, pairs = None, zip(tensors, roles, strict=True)
    if x.dtype != torch.float32 or _EXACT not in roles:
        with contextlib.suppress(torch.OutOfMemoryError):
            wide = _WIDE[x.dtype]
            truth = by_torch(
                [t if t is None or role in (_KEPT, _ENDS) else t.to(wide) for t, role in pairs]
            )
    for i, (ours, expected) in enumerate(zip(results, right, strict=True)):
        name = f"result {i + 1} of {len(right)}"
        if ours is None or expected is None:  # None stands for a gradient of zeros
            present = expected if ours is None else ours
            if present is not None and torch.count_nonzero(present):
                return f"{name} is missing"
        elif expected.numel():
            eps = max(step, torch.finfo(x.dtype).eps)
            ratio = _worst(ours, expected, None if truth is None else truth[i], eps)
            if not ratio <= 1:
                shape = f"{name}, {list(expected.shape)}"
                return f"{shape}, has an error of {ratio:.3g} times what rounding explains"
    return ""


def _worst(ours: Tensor, right: Tensor, truth: Tensor | None, eps: float) -> float:
    """The largest |ours - truth| / allowed over all elements; at most 1 if the kernels are right.

    For each row, with ``right`` PyTorch's results:

        allowed = _SLACK · max |right - truth| + 2 · eps · max |truth|

    So large numbers in one row can't hide an error in another one.  If ``truth`` is None, it is
    ``right``, and _SLACK · eps · max |right| replaces the first term.  Elements where PyTorch's
    result isn't finite are skipped.
    """
    matrices, worst = [*map(_long_rows, (ours, right, right if truth is None else truth))], 0.0
    # In float64, block by block, because whole matrices would take more memory.
    for rows in slices(len(matrices[0]), _BLOCK // matrices[0].shape[1]):
        our, their, true = (matrix[rows].double() for matrix in matrices)
        error, size = (
            each.abs().nan_to_num(0.0, 0.0).amax(1, keepdim=True) for each in (their - true, true)
        )
        allowed = _SLACK * error + 2 * eps * size + (_SLACK * eps * size if truth is None else 0.0)
        our_error = torch.where(their.isfinite() & true.isfinite(), (our - true).abs(), 0.0)
        ratio = torch.where(our_error == 0, 0.0, our_error / allowed)
        worst = max(worst, ratio.nan_to_num(torch.inf).amax().item())
    return worst


def _long_rows(tensor: Tensor) -> Tensor:
    """The tensor as a matrix whose rows have at least _FEW elements, or as one row.

    A matrix with fewer columns is transposed, because a row's error is estimated from its elements.
    """
    matrix = tensor.reshape(-1, tensor.shape[-1])
    if matrix.shape[1] < _FEW <= len(matrix):
        return matrix.T
    return matrix if matrix.shape[1] >= _FEW else matrix.reshape(1, -1)


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))
