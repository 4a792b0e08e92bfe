"""A call, resolved once and replayed: the torch operations and the launches that it comes to.

To choose tiles, grids, splits and buffers, and to bind a kernel's arguments, costs the host more
than a small layer costs the device.  All of that depends on shapes, strides, dtypes, alignment and
settings alone.  So a call with new ones runs on stand-ins first, tensors without data, and what it
asks for is written down as a list of steps; this call and all later ones of its kind follow the
list.  A step puts into one place of a list of values what a function makes of other places:

    place  0  1      2        3            4                5                  6
    value  x  lora_a stream   new_empty(0) data_ptr(1)      data_ptr(3)        run(…, 2, …, 4, 5)
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.tools.tensor_descriptor import TensorDescriptor

from . import plan, target
from .common import INTERPRETED
from .launch import Launch, is_intercepted, recording

_MOST = 1024  # calls that are kept; some 20 kB each, a group of three twice that
_calls: dict[Hashable, "_Kept"] = {}


def replayed(
    function: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    settings: tuple[Hashable, ...],
    covers: Callable[[], bool],
    calls: dict | None = None,
) -> list[Tensor | None] | None:
    """What ``function(tensors, *settings)`` returns, a list of tensors it made, and of None.

    The function may use torch's operations and this package's launchers.  What it does may depend
    on the settings, and on everything of the tensors but their elements.  They are on one device,
    which is the current one.  None if a call of a new kind isn't one that it ``covers``.

    ``calls``: the caller's own, for tensors that agree in all but their elements.
    """
    if is_intercepted() or _is_watched():
        return list(function(tensors, *settings)) if covers() else None
    key: Hashable = (function, settings, plan.forced(), target.forced())
    if calls is None:
        key, calls = (key, *map(_facts, tensors)), _calls
    kept = calls.get(key)
    if kept is None:
        if not covers():
            return None
        kept = _resolve(function, tensors, settings)
        while len(calls) >= _MOST:
            calls.pop(next(iter(calls)), None)  # the oldest
        calls[key] = kept
    return kept.replay(tensors)


def _facts(tensor: Tensor | None) -> Hashable:
    """What launchers and Triton look at, and ``covers``.

    From aligned addresses, 16 bytes are loaded at once.
    """
    if tensor is None:
        return None
    shape, address = tensor.shape, tensor.data_ptr() & 15
    return shape, tensor.stride(), tensor.dtype, tensor.device, address, tensor.is_neg()


def _is_watched() -> bool:
    """Whether a profiler wants to hear of launches; Triton tells it in ordinary ones."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


class _Step(NamedTuple):
    function: Callable
    arguments: Callable[[list], tuple]  # picks them from the values
    place: int  # of the result
    done: tuple[int, ...]  # places that no later step needs


class _Kept(NamedTuple):
    values: list[Any]  # constants, and room for the rest
    inputs: int
    steps: list[_Step]
    results: list[int | None]

    def replay(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        values = self.values.copy()
        values[: self.inputs] = tensors
        values[self.inputs] = _stream()
        for function, arguments, place, done in self.steps:
            values[place] = function(*arguments(values))
            for each in done:
                values[each] = None
        return [None if place is None else values[place] for place in self.results]


def _resolve(
    function: Callable, tensors: Sequence[Tensor | None], settings: Sequence[Hashable]
) -> _Kept:
    recorder = _Recorder(tensors)
    # Not in inference mode, where a view doesn't know its base.
    with torch.inference_mode(False), torch.no_grad(), recorder, recording(recorder.add_launch):
        results = function(recorder.stand_ins, *settings)
    return recorder.kept(results)


class _Recorded(NamedTuple):
    function: Callable
    arguments: tuple[int, ...]
    place: int
    acts: bool  # on memory: it is more than its result


class _Recorder(TorchFunctionMode):
    """Writes down what happens to stand-ins, and answers for their device and their address."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.stand_ins = [
            None
            if tensor is None
            else torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            for tensor in tensors
        ]
        self.device = next(tensor.device for tensor in tensors if tensor is not None)
        self.values: list[Any] = [None] * (len(tensors) + 1)  # the last is the stream's
        self.stream = len(tensors)
        self.steps: list[_Recorded] = []
        self.places: dict[int, int] = {}  # of tensors, by id
        self.addresses: dict[int, int] = {}  # modulo 16, of what isn't allocated here
        self.known: dict[tuple, int] = {}  # places of addresses
        self.alive: list[Any] = []  # so that an id stays one tensor's
        for place, (stand_in, tensor) in enumerate(zip(self.stand_ins, tensors, strict=True)):
            if stand_in is not None and tensor is not None:
                self._settle(stand_in, place)
                self.addresses[place] = tensor.data_ptr() & 15

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = getattr(function, "__name__", "")
        if name == "data_ptr":
            return self._address(arguments[0])
        if name == "__get__" and function.__self__ is Tensor.device:
            return self.device
        if name == "__get__" and function.__self__ is Tensor._base:
            return function(*arguments)
        out = keywords.get("out")
        result = function(*arguments, **keywords) if out is None else out
        if isinstance(result, Tensor) or (
            isinstance(result, tuple) and any(isinstance(each, Tensor) for each in result)
        ):
            self._add_operation(function, arguments, keywords, result)
        return result

    def add_launch(self, launch: Launch) -> None:
        """A launch of Triton's compiled kernel with addresses, or of its interpreter's."""
        operands = [launch.arguments[name] for name in launch.kernel.arg_names]
        if INTERPRETED.value:
            run: Callable = partial(launch.kernel[launch.grid], **launch.options)
            places = [self._place_of(operand, address=False) for operand in operands]
        else:
            kernel = launch.compile()
            launcher = kernel.run  # which loads it
            arguments = [*(*launch.grid, 1, 1)[:3], _Place(self.stream)]
            arguments += [kernel.function, kernel.packed_metadata, None, None, None]
            arguments += [_Place(self._place_of(operand, address=True)) for operand in operands]
            run, arguments = _bare(launcher, arguments)
            places = [self._place_of(argument) for argument in arguments]
        self._step(run, places, acts=True)

    def kept(self, results: Sequence[Tensor | None]) -> _Kept:
        places = [None if tensor is None else self._place_of(tensor) for tensor in results]
        return _Kept(self.values, self.stream, _in_order(self.steps, places), places)

    def _add_operation(
        self, function: Callable, arguments: tuple, keywords: dict, result: Any
    ) -> None:
        names = tuple(name for name, value in keywords.items() if isinstance(value, Tensor))
        constant = {name: value for name, value in keywords.items() if name not in names}
        function = partial(function, **constant) if constant else function
        if names:
            function = partial(_named, function, names)
        places = [self._place_of(each) for each in (*arguments, *(keywords[n] for n in names))]
        tensors = (result,) if isinstance(result, Tensor) else result
        # in place, or into ``out``
        acts = "out" in names or any(id(tensor) in self.places for tensor in tensors)
        place = self._step(function, places, acts=acts)
        if isinstance(result, Tensor):
            if not acts:
                self._settle(result, place)
            return
        for i, tensor in enumerate(tensors):
            self._settle(tensor, self._step(operator.getitem, [place, self._constant(i)]))

    def _place_of(self, value: Any, address: bool = False) -> int:
        """Where this value will be; of a tensor, or of what is in a list, its ``address``."""
        if isinstance(value, _Place):
            return value.place
        if isinstance(value, Tensor):
            if id(value) not in self.places:  # no input, and nothing that was made: a constant
                self._settle(value, self._constant(value))
            return self._pointer(value) if address else self.places[id(value)]
        if isinstance(value, TensorDescriptor):
            describe = partial(_describe, value.__dict__ | {"base": None})
            return self._step(describe, [self._place_of(value.base)])
        if isinstance(value, (tuple, list)) and any(
            isinstance(each, (Tensor, _Place)) for each in value
        ):
            places = [self._place_of(each, address) for each in value]
            return self._step(_together, places)
        return self._constant(value)

    def _pointer(self, tensor: Tensor) -> int:
        """A view's address is its base's and an offset: views needn't be made for launches."""
        base = _base(tensor)
        pointer = self._step(Tensor.data_ptr, [self.places[id(base)]])
        offset = _offset(tensor)
        return self._step(operator.add, [pointer, self._constant(offset)]) if offset else pointer

    def _address(self, tensor: Tensor) -> int:
        place = self.places[id(_base(tensor))]
        return 2**20 + self.addresses.get(place, 0) + _offset(tensor)

    def _settle(self, tensor: Tensor, place: int) -> None:
        self.places[id(tensor)] = place
        self.alive.append(tensor)

    def _constant(self, value: Any) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _step(self, function: Callable, places: Sequence[int], acts: bool = False) -> int:
        arguments = tuple(places)
        known = self.known.get((function, arguments))
        if known is not None:
            return known
        place = self._constant(None)
        self.steps.append(_Recorded(function, arguments, place, acts))
        if function in _OF_MEMORY:
            self.known[function, arguments] = place
        return place


def _in_order(steps: Sequence[_Recorded], results: Sequence[int | None]) -> list[_Step]:
    """The steps that something needs; each lets go of what is needed no more.

    An address needs the tensor that it is of.
    """
    owners: dict[int, set[int]] = {}
    for step in steps:
        if step.function in _OF_MEMORY:
            owners[step.place] = set().union(*({p} | owners.get(p, set()) for p in step.arguments))
    made = {step.place for step in steps}
    needed = {place for place in results if place is not None}
    kept: list[_Step] = []
    for step in reversed(steps):
        if not step.acts and step.place not in needed:
            continue
        uses = set().union(*({p} | owners.get(p, set()) for p in step.arguments))
        done = tuple(sorted((uses - needed) & made))
        needed |= uses
        kept.append(_Step(step.function, _picker(step.arguments), step.place, done))
    return kept[::-1]


def _together(*values: Any) -> tuple:
    return values


# What leads from a tensor to an address: the memory must last as long as any of it is needed.
_OF_MEMORY = (Tensor.data_ptr, operator.add, operator.getitem, _together)


def _picker(places: Sequence[int]) -> Callable[[list], tuple]:
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return operator.itemgetter(*places)


def _named(function: Callable, names: tuple[str, ...], *arguments: Any) -> Any:
    """``function`` with the last of the arguments under their names."""
    count = len(arguments) - len(names)
    return function(*arguments[:count], **dict(zip(names, arguments[count:], strict=True)))


class _Place:
    """What a launch will find in this place of the values."""

    def __init__(self, place: int) -> None:
        self.place = place


def _bare(launcher: Any, arguments: Sequence[Any]) -> tuple[Callable, Sequence[Any]]:
    """The function in C behind Triton's launcher, and what that hands to it for these arguments.

    The launcher itself, where there is more to it: scratch memory, a sanitizer.
    """
    fields = vars(launcher)
    scratch = [value for name, value in fields.items() if name.endswith("scratch_size")]
    if not callable(fields.get("launch")) or any(scratch) or fields.get("gsan_enabled"):
        return launcher, arguments
    handed: list[tuple] = []
    watched = copy(launcher)
    watched.launch = lambda *found: handed.append(found)
    watched(*arguments)
    return fields["launch"], handed[0]


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _offset(tensor: Tensor) -> int:
    """Bytes from its base's address to its own."""
    elements = tensor.storage_offset() - _base(tensor).storage_offset()
    return elements * tensor.element_size()


def _describe(fields: dict[str, Any], base: Tensor) -> TensorDescriptor:
    """The descriptor of these fields for another tensor; checked when the call was resolved."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(fields)
    descriptor.base = base
    return descriptor


def _stream() -> Any:
    """What Triton launches on now."""
    if INTERPRETED.value:
        return None
    active = triton.runtime.driver.active
    return active.get_current_stream(active.get_current_device())
