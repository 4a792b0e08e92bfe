"""A module's record, cached on the module and protected by a guard.

A :class:`Record` is what calls of a module compute with: outputs, dropouts, and what else a call
needs; or the reason why no node runs the call.  To read it takes longer than many a call.  So the
module keeps it, with a :class:`Guard`: the state of everything that it was read from, which is the
classes, attributes, submodules and hooks of the module and its parts, and the facts of their
tensors.  Each call compares the guard, in C as far as possible, and reads anew after any change.

A record is valid while its guard holds.  A reader may therefore ask a guarded module anything,
without a change here.  A condition outside of modules (a global hook, a transform) belongs in
``why_not`` or :func:`.dispatch.why_not_here`, which run before a module is read, and also in
:func:`fastlora.ops.kinds.key_of`, because a call that finds its key in ``calls`` skips them.

A guard keeps no parameter alive: it remembers the place of each one, and looks there in each call.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..formats import PackedLayer, vendor_of
from ..formats.format import Quantized
from ..ops.kinds import key_of_x, remember
from ..projection import AUTOCAST_DTYPES, DTYPES, Output, flatten, is_plain, layouts_of, unflatten
from .members import plain_class_of

# In a module's __dict__: a record without gradients and one with, because checkpointing alternates.
_PLACES = ("_fastlora_record", "_fastlora_record_followed")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes of every module that don't change its calls: hooks on state dicts …
_SILENT = {*vars(nn.Module()), *_PLACES}.difference(
    _HOOKS, ("_parameters", "_buffers", "_modules", "training")
)
_HOOK_OF_ACCELERATE = "_hf_hook"
_DEPTH = 3  # of vendors' objects: a weight's state, and the state of its scales in that
_MOST_CALLS, _MOST_ATTEMPTS = 64, 8  # keys of one module; doublings of a wait
# Methods that a patch may replace on a class, and PEFT's properties that a reader asks.
_get: Callable = dict.get
# All that a call asks of a tensor, except its address and its numbers.
_GET = attrgetter("dtype", "shape", "requires_grad", "device")
_FACTS = (type, _GET, Tensor.stride)
_OF_A_CLASS = ("forward", "__call__", "active_adapters", "disable_adapters", "merged")


class Record(NamedTuple):
    """The tensors and numbers that a module's calls use; or ``reason``, why no node runs them."""

    reason: str
    outputs: tuple[Output[Tensor], ...] = ()  # a layer's; gate, up, down; experts' up and down
    dropouts: tuple[float, ...] = (0.0,)  # of a layer's adapters; of each output of a block
    packed: tuple[PackedLayer | None, ...] = (None,)  # of quantized bases, for each output
    how: Any = None  # a gated MLP's activation; Experts; a DoRA adapter's magnitude
    drop: nn.Module | None = None  # the dropout of a PEFT layer's last adapter
    adapter: str = ""  # the name of its first one

    @property
    def output(self) -> Output[Tensor] | None:
        """A layer's."""
        return self.outputs[0] if self.outputs else None


class Recorder(NamedTuple):
    """How modules of a class are read and called; the functions' first argument is the module."""

    why_not: Callable[[Any, Any], object]  # true if no node runs calls with this x at this moment
    read: Callable[[Any], Record]
    parts: Callable[[Any], Iterable[nn.Module]]  # the other modules that ``read`` looks at
    # The output for x, None where the module's own forward takes the call; and the call's kind, for
    # ``run``, if the call uses the record's tensors as they are.
    run_record: Callable[[Any, Tensor, Record], tuple[Tensor | None, Any]]
    # The output of a call of a cached kind: x and the record's tensors laid flat, and the kind.
    run: Callable[[Sequence[Tensor], Any], Tensor]


class Table(NamedTuple):
    """A row for each guarded object of one kind: the result of a function of that object.

    It is stored by columns, so that all rows are compared in C.
    """

    function: Callable
    columns: tuple[tuple, ...]  # the function's arguments
    expected: tuple


def _table(function: Callable, rows: Iterable[tuple]) -> list[Table]:
    """The table of these rows, which end with the function's result; none without rows."""
    columns = [*zip(*rows, strict=True)]
    return [Table(function, tuple(columns[:-1]), columns[-1])] if columns else []


class Guard:
    """The state of a module and its parts, to be compared with their state in a later call.

    It lies in the module's ``__dict__`` and refers neither to that nor to the module: a cycle would
    keep the weights of a model that is no longer in use.
    """

    def __init__(self, module: nn.Module, parts: Sequence[nn.Module]) -> None:
        self._containers: list[Any] = []  # dicts and lists without tensors, compared with copies
        self._empty: list[Any] = []
        # Of dicts with tensors, which a copy would keep alive: (dict, name) of each tensor, (dict,
        # name, value) of everything else, and (dict, length).
        places: list[tuple[dict, Hashable]] = []
        values: list[tuple[dict, Hashable, Any]] = []
        sizes: list[tuple[dict, int]] = []

        def look_at(entries: dict, depth: int = 0) -> None:
            """``depth``: how far to look into objects."""
            has_tensors = any(isinstance(value, Tensor) for value in entries.values())
            by_name = has_tensors or any(place in entries for place in _PLACES)
            if by_name:
                sizes.append((entries, len(entries)))
            else:
                (self._containers if entries else self._empty).append(entries)
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    places.append((entries, name))
                elif name not in _SILENT:
                    if by_name:
                        values.append((entries, name, value))
                    look_into(name, value, depth)

        def look_into(name: Hashable, value: Any, depth: int) -> None:
            if name in _HOOKS and value:
                sizes.append((value, len(value)))
            elif name in _HOOKS:
                self._empty.append(value)
            elif isinstance(value, dict):
                look_at(value)
            elif isinstance(value, list):
                self._containers.append(value)
            elif isinstance(value, nn.ModuleDict):  # PEFT's, of adapters, which is never called
                look_at(value._modules)
            elif name == _HOOK_OF_ACCELERATE:
                look_at(vars(value))
            elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
                look_at(vars(value), depth - 1)

        home = {name: value for name, value in vars(module).items() if name not in _SILENT}
        self._home = [*home], [*home.values()], len(vars(module))
        for name, value in home.items():
            look_into(name, value, 0)
        for part in parts:
            look_at(vars(part))
        whole = [module, *parts]
        packed = [each for each in whole if vendor_of(each, plain_class_of(each)) is not None]
        for layer in packed:  # whose weights have attributes, such as bitsandbytes' state
            for value in (*layer._parameters.values(), vars(layer).get("state")):
                if value is not None:
                    look_at(vars(value), _DEPTH)
        kinds = dict.fromkeys([*map(type, whole), *map(plain_class_of, whole)])
        attributes = [(kind, name) for kind in kinds for name in _OF_A_CLASS if hasattr(kind, name)]
        attributes += [(part, "__class__") for part in parts]
        self._class, self._places = type(module), [*zip(*places, strict=True)] or [(), ()]
        self._copies = [each.copy() for each in self._containers]
        self._tables = [
            *_table(_get, values),
            *_table(len, sizes),
            *_table(getattr, [(*each, getattr(*each)) for each in attributes]),
        ]
        # A reader of a packed layer may depend on the numbers of frozen tensors also.
        self._facts_of = (*_FACTS, _version_of) if packed else _FACTS
        tensors = self.tensors()
        self.is_whole = not any(map(_is_strange, tensors))
        if self.is_whole:
            self._facts = [[*map(fact, tensors)] for fact in self._facts_of]
            self._addresses = [*map(Tensor.data_ptr, tensors)]
            # A tied tensor is at several places, and the record may have used any of them.
            first: dict[int, int] = {}
            firsts = [first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors)]
            self._tied = [(i, j) for i, j in enumerate(firsts) if i != j]

    def tensors(self) -> list[Any]:
        """Those of now; None for one that is gone."""
        return [*map(_get, *self._places)]

    def tensors_now(self, module: nn.Module, at_their_places: bool) -> list[Tensor] | None:
        """The tensors, if nothing changed except the numbers of those that train; else None.

        ``at_their_places``: in memory also; else they may have moved, as FSDP's do, but must be
        aligned as they were, because kernels depend on that.
        """
        home, (names, values, length) = vars(module), self._home
        try:
            tensors = self.tensors()
            holds = (
                type(module) is self._class
                and len(home) == length
                # Lists compare their items by identity first, and by value otherwise.
                and [*map(home.get, names)] == values
                and all([(*map(f, *columns),) == old for f, columns, old in self._tables])
                and not any(self._empty)
                and self._containers == self._copies
                and [[*map(fact, tensors)] for fact in self._facts_of] == self._facts
                and not any(map(Tensor.is_neg, tensors))
                and not any(map(Tensor.is_inference, tensors))
                and (not self._tied or all([tensors[i] is tensors[j] for i, j in self._tied]))
            )
            addresses = [*map(Tensor.data_ptr, tensors)] if holds else []
        except Exception:  # a tensor is gone, or of another kind; values that can't be compared
            return None
        if holds and addresses != self._addresses:
            moves = [now ^ then for now, then in zip(addresses, self._addresses, strict=True)]
            holds = not (at_their_places or any([move & 15 for move in moves]))
        return tensors if holds else None


def _version_of(tensor: Tensor) -> int | None:
    """How often the numbers of a frozen tensor changed."""
    return None if tensor.requires_grad else tensor._version


def _is_strange(tensor: Tensor) -> bool:
    """Whether a tensor is more than memory with strides.

    Its class may run torch's operations itself (a DTensor …), it may be a transform's (vmap, grad
    …), or it was made in inference mode, where numbers change without a trace.
    """
    dispatches = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if dispatches or tensor.layout is not torch.strided or tensor.is_nested:
        return True
    if tensor.is_neg() or tensor.is_inference() or tensor.is_meta:
        return True
    try:
        tensor.data_ptr()
    except RuntimeError:  # a transform's has none
        return True
    return False


class View(NamedTuple):
    """How an input lies in the memory of a guarded tensor, so that the record holds no tensor."""

    number: int  # of the guarded tensor
    dtype: torch.dtype
    place: Any  # offset, size, strides

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        tensor = tensors[self.number]
        blank = torch.empty(0, dtype=self.dtype, device=tensor.device)
        return blank.set_(tensor.untyped_storage(), *self.place)


class GuardedRecord:
    """A module's record, its guard, and the kinds of the calls that were made with it."""

    def __init__(self, record: Record) -> None:
        self.record = record  # without outputs, if it is kept
        self.calls: dict[Hashable, Any] = {}  # kinds, by :func:`fastlora.ops.kinds.key_of_x`
        self.guard: Guard | None = None  # None: it isn't kept
        self.attempts, self.wait = 0, 0  # failures to keep one; how many calls until the next try
        self._layouts = layouts_of(record.outputs)
        self._sources: list[int | View] = []  # of each input: a guarded tensor's number, or a view
        self._has_views = False

    def __reduce__(self) -> tuple:
        """Copies and pickles of a module are read anew."""
        return GuardedRecord, (Record("it wasn't read"),)

    def keep(self, guard: Guard) -> None:
        """Cache this record if later calls can locate every tensor that it uses.

        A tensor that no module owns must be a frozen view of one that a module owns, such as a
        transposed weight.
        """
        if not guard.is_whole:
            return
        tensors, outputs = guard.tensors(), self.record.outputs
        numbers = {id(tensor): i for i, tensor in enumerate(tensors)}
        storages = {tensor.untyped_storage().data_ptr(): i for i, tensor in enumerate(tensors)}
        for tensor in flatten(outputs, self._layouts):
            number = numbers.get(id(tensor))
            if number is not None:
                self._sources.append(number)
                continue
            number = storages.get(tensor.untyped_storage().data_ptr())
            if tensor.requires_grad or tensor.is_neg() or number is None:
                return
            place = tensor.storage_offset(), tensor.shape, tensor.stride()
            self._sources.append(View(number, tensor.dtype, place))
            self._has_views = True
        self.guard = guard
        no_weight: Any = None
        packed = [layer and layer._replace(weight=no_weight) for layer in self.record.packed]
        self.record = self.record._replace(outputs=(), packed=tuple(packed))

    def tensors_now(self, module: nn.Module) -> list[Tensor] | None:
        """The guarded tensors, if the record is valid."""
        guard = self.guard  # read once, because another thread may drop it
        return None if guard is None else guard.tensors_now(module, self._has_views)

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs' tensors laid flat, from the guarded ones of now."""
        return [
            tensors[each] if isinstance(each, int) else each.of(tensors) for each in self._sources
        ]

    def now(self, inputs: Sequence[Tensor]) -> Record:
        """The record with these tensors of its outputs, laid flat."""
        return self.record._replace(outputs=tuple(unflatten(inputs, self._layouts)))


def record_of(module: nn.Module, recorder: Recorder) -> tuple[GuardedRecord, list[Tensor] | Record]:
    """A module's guarded record, and its outputs' inputs of now; or a record that is read anew."""
    home, followed = vars(module), torch.is_grad_enabled()
    place, other_place = _PLACES[followed], _PLACES[not followed]
    before: GuardedRecord | None = home.get(place)
    if before is not None:
        tensors = before.tensors_now(module)
        if tensors is not None:
            before.attempts = before.wait = 0
            return before, before.inputs(tensors)
    if before is not None and before.wait:  # the module changes in each call: a guard costs as much
        before.wait, before.guard = before.wait - 1, None
        record = recorder.read(module)
        return GuardedRecord(record), record
    for each in _PLACES:
        home.setdefault(each, None)
    # The guard first: a change by another thread while the module is read fails the next compare.
    guard = Guard(module, [*recorder.parts(module)])
    record = recorder.read(module)
    made = GuardedRecord(record)
    made.attempts = 0 if before is None else min(before.attempts + 1, _MOST_ATTEMPTS)
    made.wait = 2**made.attempts - 1
    other: GuardedRecord | None = home.get(other_place)
    if other is not None and other.tensors_now(module) is None:
        other = None  # it may hold what was replaced
    home.update({place: made, other_place: other})
    made.keep(guard)
    return made, record


def call_recorded(module: nn.Module, x: Tensor, recorder: Recorder) -> Tensor | None:
    """The module's output for x; None where the module's own forward takes the call."""
    if torch.compiler.is_compiling():
        if recorder.why_not(module, x):
            return None
        return recorder.run_record(module, x, recorder.read(module))[0]
    key = key_of_x(x)
    made: GuardedRecord | None = vars(module).get(_PLACES[torch.is_grad_enabled()])
    if key is not None and made is not None:
        call = made.calls.get(key)
        # The key covers everything else that ``why_not`` asks.
        if call is not None and not nn_module._has_any_global_hook():
            tensors = made.tensors_now(module)
            if tensors is not None:
                made.attempts = made.wait = 0
                return recorder.run([x, *made.inputs(tensors)], call)
    return None if recorder.why_not(module, x) else _call_anew(module, x, key, recorder)


def _call_anew(module: nn.Module, x: Tensor, key: Hashable, recorder: Recorder) -> Tensor | None:
    made, answer = record_of(module, recorder)
    record = answer if isinstance(answer, Record) else made.now(answer)
    y, call = recorder.run_record(module, x, record)
    if key is not None and call is not None and made.guard is not None:
        remember(made.calls, key, call, _MOST_CALLS)
    return y


def forget(module: nn.Module) -> None:
    """Leave nothing on the module."""
    for place in _PLACES:
        vars(module).pop(place, None)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the fast path takes this x beside this base weight [out, in]; else PEFT's or torch's
    forward does."""
    if not is_plain(x) or x.is_nested or x.layout is not torch.strided:
        return False
    if x.device != weight.device:
        return False
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    if isinstance(weight, Quantized):
        return x.dtype in DTYPES
    return x.dtype == weight.dtype or (
        x.dtype in AUTOCAST_DTYPES
        and weight.dtype in AUTOCAST_DTYPES
        and torch.is_autocast_enabled(x.device.type)
    )
