"""Judges the first results of compiled kernels, by PyTorch's operations, before they are used.

A call whose kernels nobody has judged on this device runs here instead, twice: with random numbers
in the place of all operands but a packed weight, and as it came.  All results of the kernels are
compared with the torch backend's; masks are the same there.  If both agree, the kernels are
believed from then on (:mod:`.trust`).  If not, or if one doesn't compile, the caller gets PyTorch's
result and a warning, and they never run again.

``FASTLORA_VERIFY``: "first", the default on a GPU; "always", each call; "off".
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...formats.format import Quantised
from ...projection import Adapter, Base, Layout, Output, flatten, unflatten
from .. import torch as torch_backend
from ..protocol import Call
from . import trust
from .cover import kernels, user_level

Run = Callable[[Sequence], list]

# All have to make the same bits.  A fault that shows in one call of three passes once in 1,000.
REPEATS = 16
# How much larger an error may be than PyTorch's own, whose sums have another order.
_SLACK = 8.0
_FEW = 32  # rows or columns
_BLOCK = 2**21  # elements that are compared at once
_SEED = 12
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
# The role of a tensor.  Random numbers replace rows, biases and factors (weights and adapters):
# zeros (a fresh lora_b, adaLN-zero) and NaN hide a wrong kernel, and a model that has them in every
# step gets a definite result once.  A packed weight stays as it is.  If it is zero or not finite,
# the call runs on PyTorch and its kernels stay unverified: two passes of PyTorch for each call.
_ROWS, _FACTOR, _PACKED = "rows", "factor", "packed"


def forward(
    run: Callable, inputs: Sequence[Tensor], seeds: Tensor | None, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """What ``run``, a backend's forward, returns for a call whose kernels are on trial."""
    runs = [
        (of_forward(run, seeds, each), of_forward(torch_backend.forward, seeds, each))
        for each in (call, _probe_of_call(call, len(inputs[0])))
    ]
    results = _judged(runs, inputs, _roles(call.layouts), _packed(inputs, call))
    return results[: len(call.layouts)], results[len(call.layouts) :]


def of_forward(forward: Callable, seeds: Tensor | None, call: Call) -> Run:
    """A backend's, as a function of a call's inputs, to every y and h."""

    def made(tensors: Sequence) -> list:
        ys, hs = forward(tensors, seeds, call)
        return [*ys, *hs]

    return made


def backward(
    run: Callable,
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    needs: Sequence[bool],
    seeds: Tensor | None,
    call: Call,
) -> list[Tensor | None]:
    """The same of a backward."""
    runs = [
        (
            of_backward(run, needs, seeds, each),
            of_backward(torch_backend.backward, needs, seeds, each),
        )
        for each in (call, _probe_of_call(call, len(inputs[0])))
    ]
    roles = [*_roles(call.layouts), *[_ROWS] * (len(hs) + len(dys))]
    return _judged(runs, [*inputs, *hs, *dys], roles, _packed(inputs, call))


def of_backward(backward: Callable, needs: Sequence[bool], seeds: Tensor | None, call: Call) -> Run:
    """A backend's, as a function of a call's inputs, hs and dys, to every gradient."""
    first_h, first_dy = len(needs), -len(call.layouts)

    def made(tensors: Sequence) -> list:
        hs = tensors[first_h:first_dy]
        return backward(tensors[first_dy:], tensors[:first_h], hs, needs, seeds, call)

    return made


def elementwise(run: Callable, by_torch: Callable, *matrices: Tensor, fills: int = 0) -> Any:
    """What ``run`` returns, a function of matrices; or it fills the last ``fills`` of them."""
    try:
        return run(*matrices)
    except kernels.Unproven as unproven:
        refused = unproven.refused
    if refused:
        return by_torch(*matrices)
    read, written = matrices[: len(matrices) - fills], matrices[len(matrices) - fills :]

    def of(function: Callable) -> Run:
        def made(some: Sequence) -> list:
            new = [_alike(each, _memory(each, some[0].dtype)) for each in written]
            result = function(*some, *new)
            return new or [result]

        return made

    runs = of(run), of(by_torch)
    results = _judged([runs, runs], read, [_ROWS] * len(read))
    # Only now, since a matrix may be both read and filled.
    for target, result in zip(written, results, strict=False):
        target.copy_(result)
    return None if fills else results[0]


def _roles(layouts: Sequence[Layout]) -> list[str]:
    """What becomes of a call's inputs."""
    outputs = [
        Output(
            Base(_FACTOR if layout.format is None else _PACKED, _ROWS),
            tuple([Adapter(_FACTOR, _FACTOR, scale) for scale in layout.scales]),
        )
        for layout in layouts
    ]
    return [_ROWS, *flatten(outputs, layouts)]


def _packed(inputs: Sequence[Tensor], call: Call) -> list[Quantised]:
    """The packed weights of a call."""
    weights: list[Any] = [output.base.weight for output in unflatten(inputs[1:], call.layouts)]
    return [weight for weight in weights if isinstance(weight, Quantised)]


def _probe_of_call(call: Call, count: int) -> Call:
    """The call without zero scales, with its ``count`` rows spread evenly over experts.

    Zero scales and empty segments hide a wrong kernel.
    """
    layouts = tuple([one._replace(scales=_not_zero(one.scales)) for one in call.layouts])
    rows = call.rows
    if rows is not None and rows.numbers is not None:
        numbers = rows.numbers._replace(scales=_not_zero(rows.numbers.scales))
        rows = rows._replace(numbers=numbers)
    elif rows is not None:
        ends = _alike(rows.ends, _memory(rows.ends))
        numbers_of_experts = torch.arange(1, len(ends) + 1, device=ends.device)
        rows = rows._replace(ends=ends.copy_(numbers_of_experts * count // len(ends)), shares=None)
    return call._replace(layouts=layouts, rows=rows)


def _not_zero(scales: Sequence[float]) -> tuple[float, ...]:
    return tuple([scale or 1.0 for scale in scales])


def _judged(
    runs: Sequence[tuple[Run, Run]],
    tensors: Sequence[Tensor | None],
    roles: Sequence[str],
    packed: Sequence[Quantised] = (),
) -> list:
    """What the kernels make of the tensors, if it is right; else what PyTorch makes of them.

    ``runs``: of these tensors by the kernels and by PyTorch; and of the probe by both.
    """
    (by_kernels, by_torch), probe_runs = runs
    with _disable_current_modes(), torch.no_grad():
        right, results, fault = by_torch(tensors), [], ""
        with kernels.on_trial() as trial:
            try:
                probe = _probe(tensors, roles)
                expected = probe_runs[1](probe)
                dense = (weight.dense(expected[0].dtype) for weight in packed)
                if not all(map(_is_comparable, [expected, *([each] for each in dense)])):
                    return right
                fault = _fault_of_probe(*probe_runs, probe, roles, expected)
                if not fault:
                    results = by_kernels(tensors)
                    fault = compared(by_torch, tensors, roles, results, right)
            except kernels.Unproven:  # these were found wrong before
                return right
            except torch.OutOfMemoryError:
                trust.give_up(trial)
                warnings.warn(
                    "there isn't enough memory to judge Triton kernels for the first time: calls "
                    "of this kind run on PyTorch's operations in this process",
                    RuntimeWarning,
                    stacklevel=user_level(),
                )
                return right
            except Exception as error:  # of a compiler, or of a driver
                fault = f"{type(error).__name__}: {error}"
    device = next(tensor.device for tensor in tensors if tensor is not None)
    names = trust.settle(trial, device, fault)
    if not fault:
        return results
    warnings.warn(
        f"the Triton kernels {names} run no more on {trust.environment(device)}, PyTorch's "
        f"operations do: {fault}. Please report it, with what `python -m fastlora doctor` prints",
        RuntimeWarning,
        stacklevel=user_level(),
    )
    return right


def _is_comparable(results: Sequence[Tensor | None]) -> bool:
    """Whether every result is finite, and none is zero everywhere."""
    made = [result for result in results if result is not None]
    return all(bool(each.isfinite().all()) and bool(each.any()) for each in made)


def _fault_of_probe(
    by_kernels: Run,
    by_torch: Run,
    tensors: Sequence[Tensor | None],
    roles: Sequence[str],
    expected: Sequence,
) -> str:
    """What is wrong with what the kernels make of random numbers; "" if nothing is."""
    results = by_kernels(tensors)
    for _ in range(REPEATS - 1):
        for first, again in zip(results, by_kernels(tensors), strict=True):
            if not _same_bits(first, again):
                return f"two calls of {REPEATS} with the same tensors made other bits"
    return compared(by_torch, tensors, roles, results, expected)


def _probe(tensors: Sequence[Tensor | None], roles: Sequence[str]) -> list[Tensor | None]:
    """The tensors, with random numbers in the place of some, which lie in memory as they do.

    Adapters that lie in one memory, as a bank's do, lie in one again.
    """
    memories: dict[tuple, Tensor] = {}
    made: list[Tensor | None] = []
    for tensor, role in zip(tensors, roles, strict=True):
        if tensor is None or role == _PACKED or not tensor.numel():
            made.append(tensor)
            continue
        place = (tensor.untyped_storage().data_ptr(), *_extent(tensor), tensor.dtype)
        if place not in memories:
            # So all parts of a sum are of about one size.
            spread = tensor.shape[-1] ** -0.5 if role == _FACTOR else 1.0
            generator = torch.Generator(tensor.device).manual_seed(_SEED + len(memories))
            memories[place] = _memory(tensor).normal_(0, spread, generator=generator)
        made.append(_alike(tensor, memories[place]))
    return made


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The elements of its storage that go with it, first and count: all, if not many more."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    if count <= 4 * tensor.numel():
        return 0, count
    ends = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()), 1 + sum((size - 1) * stride for size, stride in ends)


def _shift(tensor: Tensor) -> int:
    """The elements before the first: an address modulo 16 is a part of what is compiled for."""
    size = tensor.element_size()
    return (tensor.untyped_storage().data_ptr() + _extent(tensor)[0] * size) % 16 // size


def _memory(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """New memory for a tensor :func:`_alike`."""
    return tensor.new_empty(_extent(tensor)[1] + _shift(tensor), dtype=dtype)


def _alike(tensor: Tensor, memory: Tensor) -> Tensor:
    """A tensor in this memory, with the other's shape, strides, and address modulo 16."""
    offset = int(tensor.storage_offset()) - _extent(tensor)[0] + _shift(tensor)
    return memory.as_strided(tensor.shape, tensor.stride(), offset)


def compared(
    by_torch: Run,
    tensors: Sequence[Tensor | None],
    roles: Sequence[str],
    results: Sequence,
    right: Sequence,
) -> str:
    """What is wrong with the kernels' results beside PyTorch's; "" if nothing is."""
    x = tensors[0]
    assert x is not None
    wide = [
        tensor if tensor is None or role == _PACKED else tensor.to(_WIDE[x.dtype])
        for tensor, role in zip(tensors, roles, strict=True)
    ]
    try:
        truth = by_torch(wide)
    except torch.OutOfMemoryError:
        truth = None
    del wide
    return _difference(results, right, truth, torch.finfo(x.dtype).eps)


def _difference(results: Sequence, right: Sequence, truth: Sequence | None, eps: float) -> str:
    """What is wrong with these results, measured by PyTorch's own errors; "" if nothing is."""
    for i, (ours, its) in enumerate(zip(results, right, strict=True)):
        name = f"result {i + 1} of {len(right)}"
        if ours is None or its is None:  # a gradient of nothing may be left out
            made = its if ours is None else ours
            if made is not None and torch.count_nonzero(made):
                return f"{name} is missing"
        elif its.numel():
            wide = None if truth is None else _as_matrix(truth[i])
            share = _worst(_as_matrix(ours), _as_matrix(its), wide, eps)
            if not share <= 1:
                shape = f"{name}, {list(its.shape)}"
                return f"{shape}, has an error of {share:.3g} times what rounding explains"
    return ""


def _worst(ours: Tensor, its: Tensor, truth: Tensor | None, eps: float) -> float:
    """The largest error, in parts of what is allowed.

    That is some times PyTorch's largest error in the same row or in the same column, whichever is
    less, so that no row or column of large numbers hides an error in another one; and a rounding.
    Without a truth, PyTorch's result is it, with errors of a rounding.  Where PyTorch's isn't
    finite, nothing can be said.
    """
    matrices = ours, its, its if truth is None else truth
    of_rows, of_columns = [], torch.zeros(2, its.shape[1], dtype=torch.float64, device=its.device)
    for _, it, true in _blocks(*matrices):
        sizes = torch.stack([(it - true).abs(), true.abs()]).nan_to_num(0.0, 0.0)
        of_rows.append(sizes.amax(2))
        of_columns = torch.maximum(of_columns, sizes.amax(1))
    rows_in_all = torch.cat(of_rows, 1)
    if its.shape[0] < _FEW:  # too few to know what an error in a column may be
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
    """Some rows of each, in float64: of a whole result that may be more than there is room for."""
    step = max(1, _BLOCK // matrices[0].shape[1])
    for first in range(0, len(matrices[0]), step):
        yield [matrix[first : first + step].double() for matrix in matrices]


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.view(1, -1)


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(numbers), other.contiguous().view(numbers))
