"""A module is read once: what its call computes with, kept on it for as long as that stands.

A reader answers with a :class:`Reading`: outputs, dropouts, and what else a call needs; or the
reason why the call isn't a node's.  It may ask the modules that it reads whatever it likes, which
takes longer than many a call.  So a :class:`Watch` writes down all that these modules hold: their
classes, attributes, submodules and hooks, and of each tensor what it is.  The next call compares
that, in C as far as it goes, and reads anew where anything differs.

So a new question in a reader needs nothing here, if it is asked of a module that is watched.  What
else an answer hangs on is asked before anything is read (``why_not``, :func:`.way.why_not_here`).
A known call doesn't ask that: whoever adds to it adds to the call's key, too (:func:`key_of`: x,
autocast, the backend …; None where :func:`.way.is_ordinary` says so).

No parameter is kept alive: its place is remembered, in which each call finds it.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..backends import asked_backend
from ..formats import PackedLayer, vendor_of
from ..formats.format import Quantized
from ..ops.way import autocast_dtype, is_ordinary
from ..projection import (
    AUTOCAST_DTYPES,
    DTYPES,
    Output,
    facts_of,
    flatten,
    is_plain,
    layouts_of,
    unflatten,
)
from .members import plain_class_of

# In a module's __dict__, without gradients and with them, which checkpointing takes in turn.
_PLACES = ("_fastlora_reading", "_fastlora_reading_followed")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What else torch's modules have of themselves says nothing of their calls: hooks on state dicts …
_SILENT = {*vars(nn.Module()), *_PLACES}.difference(
    _HOOKS, ("_parameters", "_buffers", "_modules", "training")
)
_HOOK_OF_ACCELERATE = "_hf_hook"
_DEPTH = 3  # of a vendor's objects: a weight's state, and in that the state of its scales
_MOST_CALLS, _MOST_ATTEMPTS = 64, 8  # kinds of x, of one module; doublings of a wait
_get: Any = dict.get
_facts_of = attrgetter("dtype", "shape", "requires_grad", "device")
# What somebody may put on a class, and properties of PEFT's that a reading asks.
_OF_A_CLASS = ("forward", "__call__", "active_adapters", "disable_adapters", "merged")


class Reading(NamedTuple):
    """A module as a call finds it; or ``reason``, why the call isn't a node's."""

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


class Reader(NamedTuple):
    """How modules of a class are read and called; the functions' first argument is the module."""

    why_not: Callable[[Any, Any], object]  # true if no call with this x is a node's at this moment
    read: Callable[[Any], Reading]
    parts: Callable[[Any], Iterable[nn.Module]]  # what is read beside the module
    # The output for x as it was read, None where the call is the module's own; and what record a
    # call like this one has, if it has one: it uses the reading's tensors as they are.
    run_reading: Callable[[Any, Tensor, Reading], tuple[Tensor | None, Any]]
    # The output, of x and the reading's tensors laid flat, by the record of an earlier call.
    run: Callable[[Sequence[Tensor], Any], Tensor]


class Watch:
    """What a module and its parts hold at this moment, to be compared with what they hold later.

    It is kept in the module's ``__dict__``, and so knows neither that nor the module: a circle
    would keep the weights of a model that nobody has any more.
    """

    def __init__(self, module: nn.Module, parts: Sequence[nn.Module]) -> None:
        """Of vendors' layers a reading depends on numbers, too, and on attributes of tensors, such
        as bitsandbytes' state."""
        self._containers: list[Any] = []  # dicts and lists, which are as their copies are
        # A tensor mustn't be kept alive, and readings come and go: of dicts with either, each
        # has under the name of the same number this value, and there are no more entries than now.
        self._dicts: list[dict] = []
        self._names: list[Hashable] = []
        self._values: list[Any] = []
        self._sized: list[Any] = []
        self._empty: list[Any] = []
        self._tensor_dicts: list[dict] = []
        self._tensor_names: list[Hashable] = []
        home = vars(module)
        self._home_names = [name for name in home if name not in _SILENT]
        self._home_values = [home[name] for name in self._home_names]
        self._home_length = len(home)
        for name, value in zip(self._home_names, self._home_values, strict=True):
            self._look_into(name, value, 0)
        for part in parts:
            self._look_at(vars(part))
        whole = [module, *parts]
        packed = [each for each in whole if vendor_of(each, plain_class_of(each)) is not None]
        for layer in packed:
            for value in (*layer._parameters.values(), vars(layer).get("state")):
                if value is not None:
                    self._look_at(vars(value), _DEPTH)
        self._lengths = [*map(len, self._sized)]
        self._copies = [each.copy() for each in self._containers]
        self._class, self._parts, self._classes = type(module), parts, [*map(type, parts)]
        kinds = dict.fromkeys([*map(type, whole), *map(plain_class_of, whole)])
        of_classes = [(kind, name) for kind in kinds for name in _OF_A_CLASS if hasattr(kind, name)]
        self._kinds, self._class_names = zip(*of_classes, strict=True)
        self._of_classes = [*map(getattr, self._kinds, self._class_names)]
        tensors = self.tensors()
        self.is_whole = not any(map(_is_strange, tensors))
        if self.is_whole:
            frozen = [i for i, tensor in enumerate(tensors) if not tensor.requires_grad]
            self._frozen = frozen if packed else []
            self._tensor_classes = [*map(type, tensors)]
            self._facts = [*map(_facts_of, tensors)]
            self._strides = [*map(Tensor.stride, tensors)]
            self._addresses = [*map(Tensor.data_ptr, tensors)]
            self._versions = self._versions_of(tensors)
            first: dict[int, int] = {}
            of_first = [first.setdefault(id(each), i) for i, each in enumerate(tensors)]
            # Of a tensor at several places, tied, a reading may have come from any.
            self._tied = [(i, j) for i, j in enumerate(of_first) if i != j]

    def _look_at(self, entries: dict, depth: int = 0) -> None:
        """``depth``: how far to look into objects."""
        has_tensors = any(isinstance(value, Tensor) for value in entries.values())
        by_name = has_tensors or any(place in entries for place in _PLACES)
        holder = self._sized if by_name else self._containers if entries else self._empty
        holder.append(entries)
        for name, value in entries.items():
            if isinstance(value, Tensor):
                self._tensor_dicts.append(entries)
                self._tensor_names.append(name)
            elif name not in _SILENT:
                if by_name:
                    self._dicts.append(entries)
                    self._names.append(name)
                    self._values.append(value)
                self._look_into(name, value, depth)

    def _look_into(self, name: Hashable, value: Any, depth: int) -> None:
        if name in _HOOKS:
            (self._sized if value else self._empty).append(value)
        elif isinstance(value, dict):
            self._look_at(value)
        elif isinstance(value, list):
            self._containers.append(value)
        elif isinstance(value, nn.ModuleDict):  # PEFT's, of adapters: nobody calls it
            self._look_at(value._modules)
        elif name == _HOOK_OF_ACCELERATE:
            self._look_at(vars(value))
        elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            self._look_at(vars(value), depth - 1)

    def _versions_of(self, tensors: Sequence[Tensor]) -> list[int]:
        """How often the numbers of those that are frozen changed."""
        return [tensors[i]._version for i in self._frozen]

    def tensors(self) -> list[Tensor]:
        return [*map(_get, self._tensor_dicts, self._tensor_names)]

    def tensors_now(self, module: nn.Module, at_their_places: bool) -> list[Tensor] | None:
        """The tensors, if nothing is another but numbers of those that train; else None.

        ``at_their_places``: in memory, too; else they may have moved, as FSDP's do, but stay
        aligned as they were, which kernels ask.
        """
        home = vars(module)
        try:
            tensors = self.tensors()
            stands = (
                type(module) is self._class
                and len(home) == self._home_length
                # Lists compare what they hold by identity first, and else by value.
                and [*map(home.get, self._home_names)] == self._home_values
                and [*map(_get, self._dicts, self._names)] == self._values
                and [*map(len, self._sized)] == self._lengths
                and not any(self._empty)
                and self._containers == self._copies
                and [*map(type, self._parts)] == self._classes
                and [*map(getattr, self._kinds, self._class_names)] == self._of_classes
                and [*map(type, tensors)] == self._tensor_classes
                and [*map(_facts_of, tensors)] == self._facts
                and [*map(Tensor.stride, tensors)] == self._strides
                and (not self._frozen or self._versions_of(tensors) == self._versions)
                and (not self._tied or all([tensors[i] is tensors[j] for i, j in self._tied]))
                and not any(map(Tensor.is_neg, tensors))
                and not any(map(Tensor.is_inference, tensors))
            )
            addresses = [*map(Tensor.data_ptr, tensors)] if stands else []
        except Exception:  # a tensor is gone, or of another kind; things that can't be compared
            return None
        if stands and addresses != self._addresses:
            moves = [now ^ then for now, then in zip(addresses, self._addresses, strict=True)]
            stands = not (at_their_places or any([move & 15 for move in moves]))
        return tensors if stands else None


def _is_strange(tensor: Tensor) -> bool:
    """Whether it isn't memory with strides alone: of a class that runs torch's operations itself
    (a DTensor …), a transform's (vmap, grad …), or made in inference mode, where numbers change
    unseen."""
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
    """How a tensor lies in the memory of a watched one, for which a reading holds none itself."""

    number: int  # of the watched one
    dtype: torch.dtype
    place: Any  # offset, size, strides

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        tensor = tensors[self.number]
        blank = torch.empty(0, dtype=self.dtype, device=tensor.device)
        return blank.set_(tensor.untyped_storage(), *self.place)


class Memory:
    """A reading of a module, what it was read from, and the calls that came of it."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading  # without outputs, if it is kept
        self.calls: dict[Hashable, Any] = {}  # records, by :func:`key_of` x
        self.watch: Watch | None = None  # None: it isn't kept
        self.attempts, self.wait = 0, 0  # to keep one in vain; how many calls until the next
        self._layouts = layouts_of(reading.outputs)
        self._sources: list[int | View] = []  # of the inputs: a watched tensor's number, or a view
        self._has_views = False

    def __reduce__(self) -> tuple:
        """Copies and pickles of a module are read anew."""
        return Memory, (Reading("it wasn't read"),)

    def keep(self, watch: Watch) -> None:
        """Let later calls have it, if they will find every tensor of the outputs.

        One that isn't a module's has to be a view of one, and frozen, as a transposed weight is.
        """
        if not watch.is_whole:
            return
        tensors, outputs = watch.tensors(), self.reading.outputs
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
        self.watch = watch
        no_weight: Any = None
        packed = [layer and layer._replace(weight=no_weight) for layer in self.reading.packed]
        self.reading = self.reading._replace(outputs=(), packed=tuple(packed))

    def tensors_now(self, module: nn.Module) -> list[Tensor] | None:
        """The watched tensors, if the module would be read as it was."""
        watch = self.watch  # asked once: another thread may give it up
        return None if watch is None else watch.tensors_now(module, self._has_views)

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs' tensors laid flat, of the watched ones of now."""
        return [
            tensors[each] if isinstance(each, int) else each.of(tensors) for each in self._sources
        ]

    def now(self, inputs: Sequence[Tensor]) -> Reading:
        """The reading with these tensors of its outputs, laid flat."""
        return self.reading._replace(outputs=tuple(unflatten(inputs, self._layouts)))

    def learn(self, key: Hashable, record: Any) -> None:
        """What a call of this key is."""
        if len(self.calls) >= _MOST_CALLS:
            self.calls.clear()
        self.calls[key] = record


def key_of(x: Tensor) -> Hashable:
    """All that a call depends on beside what was read; None: what its calls are isn't kept."""
    if not is_ordinary(x) or x.layout is not torch.strided:
        return None
    try:
        return facts_of(x), autocast_dtype(x), asked_backend()
    except RuntimeError:  # x has no address: it outlived a transform of torch.func
        return None


def read_once(module: nn.Module, reader: Reader) -> tuple[Memory, list[Tensor] | Reading]:
    """What is kept of the module, and its outputs' inputs as they are now; or a new reading."""
    home, followed = vars(module), torch.is_grad_enabled()
    place, other_place = _PLACES[followed], _PLACES[not followed]
    before: Memory | None = home.get(place)
    if before is not None:
        tensors = before.tensors_now(module)
        if tensors is not None:
            before.attempts = before.wait = 0
            return before, before.inputs(tensors)
    if before is not None and before.wait:  # it changes all the time: to keep it costs as much
        before.wait, before.watch = before.wait - 1, None
        reading = reader.read(module)
        return Memory(reading), reading
    for each in _PLACES:
        home.setdefault(each, None)
    # Before it is read: what another thread changes meanwhile differs from this in the next call.
    watch = Watch(module, [*reader.parts(module)])
    reading = reader.read(module)
    memory = Memory(reading)
    memory.attempts = 0 if before is None else min(before.attempts + 1, _MOST_ATTEMPTS)
    memory.wait = 2**memory.attempts - 1
    other: Memory | None = home.get(other_place)
    if other is not None and other.tensors_now(module) is None:
        other = None  # it may hold what was replaced
    home.update({place: memory, other_place: other})
    memory.keep(watch)
    return memory, reading


def call_as_read(module: nn.Module, x: Tensor, reader: Reader) -> Tensor | None:
    """The module's output for x; None where the call is the module's own."""
    if torch.compiler.is_compiling():
        if reader.why_not(module, x):
            return None
        return reader.run_reading(module, x, reader.read(module))[0]
    key = key_of(x)
    memory: Memory | None = vars(module).get(_PLACES[torch.is_grad_enabled()])
    if key is not None and memory is not None:
        record = memory.calls.get(key)
        # What ``why_not`` asks beside this is in a call's key.
        if record is not None and not nn_module._has_any_global_hook():
            tensors = memory.tensors_now(module)
            if tensors is not None:
                memory.attempts = memory.wait = 0
                return reader.run([x, *memory.inputs(tensors)], record)
    return None if reader.why_not(module, x) else _call_anew(module, x, key, reader)


def _call_anew(module: nn.Module, x: Tensor, key: Hashable, reader: Reader) -> Tensor | None:
    memory, answer = read_once(module, reader)
    reading = answer if isinstance(answer, Reading) else memory.now(answer)
    y, record = reader.run_reading(module, x, reading)
    if key is not None and record is not None and memory.watch is not None:
        memory.learn(key, record)
    return y


def forget(module: nn.Module) -> None:
    """Leave nothing on the module."""
    for place in _PLACES:
        vars(module).pop(place, None)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the fast path takes this x beside this base weight [out, in]; else it is others'."""
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
