"""A module's record, cached on the module and protected by a guard.

A :class:`Record` holds the tensors and settings that a module's calls use (outputs, dropouts …), or
the reason why fastlora's autograd node (ops/node.py) can't run them.  Making a record is called
reading the module, and takes longer than many calls.  So the module caches its record with a
:class:`Guard`: a snapshot of the classes, attributes, submodules and hooks of the module and its
parts, and of the facts (dtype, shape, strides …) of their tensors.  Each call compares the snapshot
with the current state, in C as far as possible, and reads the module again after a change.

Three structures, from the outside in:

* :class:`GuardedRecord` is stored in the module's ``__dict__``.  It holds the record, the guard,
  and a dict from the key of x to a function that runs a call with this key (:data:`Known`).
* :class:`Guard` decides whether the record is valid.
* :class:`Table` is a part of the guard: many comparisons of one kind.

A record is valid while its guard holds.  The guard compares all state of the module and its parts,
not only the state that was read.  So a new line in a ``read`` method needs no change in this file.

A condition outside of modules (a global hook, a transform) isn't guarded.  It needs two checks:

    new calls               in ``why_not`` or :func:`fastlora.ops.dispatch.why_not_here`
    calls with a known key  in :func:`fastlora.ops.kinds.key_of_x` or :func:`call_recorded`

A guard refers to no parameter, so it keeps none alive.  It stores the dict that contains the
parameter, and the name in that dict.  Each call looks the parameter up there.

Modules of experts cache no record: each call reads the module (:mod:`.experts` gives the reason).
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..call.projection import (
    AUTOCAST_DTYPES,
    DTYPES,
    Output,
    flatten,
    is_plain,
    layouts_of,
    unflatten,
)
from ..common.remembered import remember
from ..formats import PackedLayer, vendor_of
from ..formats.bitsandbytes import cast_bias
from ..formats.format import Quantized
from ..ops.kinds import key_of_x
from .module_parts import plain_class_of

_PLACE = "_fastlora_record"  # the name of a module's record in its __dict__
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes that nn.Module gives every module and that aren't guarded, because calls don't depend
# on them, such as hooks on state dicts.
_UNGUARDED = {*vars(nn.Module()), _PLACE}.difference(
    _HOOKS, ("_parameters", "_buffers", "_modules", "training")
)
_HOOK_OF_ACCELERATE = "_hf_hook"
_DEPTH = 3  # levels of a vendor's objects: a weight's state contains the state of its scales
_MOST_CALLS = 64  # cached keys of a GuardedRecord
_entry: Callable = dict.get
# The properties of a tensor that a call depends on, except its address and its elements.
_PROPERTIES = attrgetter("dtype", "shape", "requires_grad", "device")
_FACTS = (type, _PROPERTIES, Tensor.stride)
_VERSION = attrgetter("_version")  # counts in-place writes
# Methods that a patch may replace on a class, and properties of PEFT's classes that records use.
_OF_A_CLASS = ("forward", "__call__", "active_adapters", "disable_adapters", "merged")


# A function that runs calls of one kind without checks (a call of a "known" kind):
# [x, *flattened tensors of the record] -> output.
Known = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Record:
    """The tensors that a module's calls use, or the reason why no autograd node runs them.

    A subclass for a kind of module adds its other settings.
    """

    reason: str  # "" if a node can run the calls
    outputs: tuple[Output[Tensor], ...] = ()  # a layer: 1; a gated MLP: gate, up, down; experts: 2
    packed: tuple[PackedLayer | None, ...] = (None,)  # for each output, its base if it is quantized


class Variant(Protocol):
    """A layer's own way to compute y, in place of the LoRA formula: DoRA, tensor parallelism."""

    def run(self, x: Tensor, record: "LinearRecord") -> tuple[Tensor, Known | None]:
        """Return (y, known) for x, as :meth:`Recorded.run_new` does; y is never None."""


@dataclass(frozen=True)
class LinearRecord(Record):
    """The record of a linear layer, with adapters or without."""

    dropouts: tuple[float, ...] = (0.0,)  # one for all adapters, or one for each
    variant: Variant | None = None

    @property
    def output(self) -> Output[Tensor] | None:
        """The layer's only output; None if no node runs the layer's calls."""
        return self.outputs[0] if self.outputs else None


class Recorded(nn.Module):
    """A mixin for modules with a cached record.  A subclass defines ``read`` and ``run_new``."""

    def why_not(self, x: Any) -> object:
        """Whether the module's own forward must run for x now: a reason or True; else "" or False.

        It checks x and conditions outside of the module.  A reason in the module is in its record.
        """
        return False

    def read(self) -> Record:
        """Read the module.  Every other module that this looks at must be in :meth:`parts`."""
        raise NotImplementedError

    def parts(self) -> Sequence[nn.Module]:
        """The other modules that :meth:`read` looks at."""
        return ()

    def classes(self) -> Iterable[type]:
        """The other classes, not of modules, whose methods :meth:`read` looks at."""
        return ()

    def run_new(self, x: Tensor, record: Any) -> tuple[Tensor | None, Known | None]:
        """Run a call with the record that :meth:`read` returned.  Returns (output, known).

        The output is None if the module's own forward must run.  ``known`` runs later calls of the
        same kind.  It is None if the call doesn't use the record's tensors unchanged.
        """
        raise NotImplementedError


class Table(NamedTuple):
    """Calls of one function, and the results that they must still give.

    Example: ``len`` of each guarded dict.  Row i calls ``function`` with the i-th entry of every
    column.  Storing columns lets ``map`` run all calls in C.
    """

    function: Callable
    columns: tuple[tuple, ...]  # one for each argument of the function
    expected: tuple  # one result for each row


def _table(function: Callable, rows: Iterable[tuple]) -> list[Table]:
    """A list with the table of these rows (arguments, then the result); empty without rows."""
    columns = [*zip(*rows, strict=True)]
    return [Table(function, tuple(columns[:-1]), columns[-1])] if columns else []


class Guard:
    """A snapshot of a module and its parts, which later calls compare with the current state.

    Each structure covers one kind of state:

    =============  ===================================================================
    _own_dict      the module's own ``__dict__``: its names, values and length
    _containers    dicts and lists without tensors; _copies has copies of them
    _empty         dicts of hooks, and other dicts, that must stay empty
    _tables        values and lengths of dicts with tensors; attributes of classes
    _places        where each tensor is found: a dict and a name in it
    _facts         dtype, shape … of these tensors, in the order of _places
    _addresses     the addresses of these tensors
    _versions      version counters of the frozen ones beside a packed layer, whose record has
                   numbers computed from their elements
    _tied          pairs of places that must hold the same tensor
    =============  ===================================================================

    The guard is stored in the module's ``__dict__``.  It refers neither to that dict nor to the
    module, because a cycle would keep the weights of an unused model alive.
    """

    def __init__(
        self, module: nn.Module, parts: Sequence[nn.Module], classes: Iterable[type] = ()
    ) -> None:
        self._containers: list[Any] = []
        self._empty: list[Any] = []
        # Dicts with tensors aren't copied.  They are split into (dict, name) for each tensor,
        # (dict, name, value) for each other entry, and (dict, length) for the dict.
        places: list[tuple[dict, Hashable]] = []
        values: list[tuple[dict, Hashable, Any]] = []
        sizes: list[tuple[dict, int]] = []

        def guard_dict(entries: dict, depth: int = 0) -> None:
            """Guard a dict, and ``depth`` levels of objects in it."""
            has_tensors = any(isinstance(value, Tensor) for value in entries.values())
            # A copy of a dict would keep its tensors, or a cached record, alive.  So such a dict is
            # guarded entry by entry.
            by_name = has_tensors or _PLACE in entries
            if by_name:
                sizes.append((entries, len(entries)))
            else:
                (self._containers if entries else self._empty).append(entries)
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    places.append((entries, name))
                elif name not in _UNGUARDED:
                    if by_name:
                        values.append((entries, name, value))
                    guard_contents(name, value, depth)

        def guard_contents(name: Hashable, value: Any, depth: int) -> None:
            """Guard the contents of a value that can change while it stays the same object."""
            if name in _HOOKS and value:
                sizes.append((value, len(value)))
            elif name in _HOOKS:
                self._empty.append(value)
            elif isinstance(value, dict):
                guard_dict(value)
            elif isinstance(value, list):
                self._containers.append(value)
            elif isinstance(value, nn.ModuleDict):  # PEFT's dict of adapters, which is never called
                guard_dict(value._modules)
            elif name == _HOOK_OF_ACCELERATE:
                guard_dict(vars(value))
            elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
                guard_dict(vars(value), depth - 1)

        # Only names and values: the module's own dict holds the guard, so storing it makes a cycle.
        own = {name: value for name, value in vars(module).items() if name not in _UNGUARDED}
        self._own_dict = [*own], [*own.values()], len(vars(module))
        for name, value in own.items():
            guard_contents(name, value, 0)
        for part in parts:
            guard_dict(vars(part))
        modules = [module, *parts]
        packed = [each for each in modules if vendor_of(each, plain_class_of(each)) is not None]
        for layer in packed:  # a packed weight has attributes, such as bitsandbytes' quant_state
            for value in (*layer._parameters.values(), vars(layer).get("state")):
                if value is not None:
                    guard_dict(vars(value), _DEPTH)
        # A patch may replace a method on a class, or give an object another class.
        owners = dict.fromkeys([*map(type, modules), *map(plain_class_of, modules), *classes])
        attributes = [(cls, name) for cls in owners for name in _OF_A_CLASS if hasattr(cls, name)]
        attributes += [(part, "__class__") for part in parts]
        self._class, self._places = type(module), [*zip(*places, strict=True)] or [(), ()]
        self._copies = [each.copy() for each in self._containers]
        self._tables = [
            *_table(_entry, values),
            *_table(len, sizes),
            *_table(getattr, [(*each, getattr(*each)) for each in attributes]),
        ]
        tensors = self.tensors()
        # False: a tensor can't be compared, so this guard can't be used (GuardedRecord.keep).
        self.is_usable = not any(map(_is_strange, tensors))
        if self.is_usable:
            self._facts = [[*map(fact, tensors)] for fact in _FACTS]
            self._frozen = [bool(packed) and not tensor.requires_grad for tensor in tensors]
            self._versions = [*map(_VERSION, compress(tensors, self._frozen))]
            self._addresses = [*map(Tensor.data_ptr, tensors)]
            # If several places hold one tensor (tied weights), the record uses one of them.  All of
            # them must still hold the same tensor: pairs (place, first place with this tensor).
            index_of: dict[int, int] = {}
            first_indices = [index_of.setdefault(id(tensor), i) for i, tensor in enumerate(tensors)]
            self._tied = [(i, j) for i, j in enumerate(first_indices) if i != j]

    def tensors(self) -> list[Any]:
        """The tensors that are at the guarded places now; None for a place without one."""
        return [*map(_entry, *self._places)]

    def tensors_now(self, module: nn.Module, at_their_places: bool) -> list[Tensor] | None:
        """The guarded tensors if the guard holds, else None.

        A change of a tensor's elements is no change, except beside a packed layer (_versions).
        ``at_their_places``: each tensor must have its old address.  Otherwise the address may
        change, as under FSDP, but not the address modulo 16, because kernels are compiled for an
        alignment.
        """
        own, (names, values, length) = vars(module), self._own_dict
        try:
            tensors = self.tensors()
            holds = (
                type(module) is self._class
                and len(own) == length
                # Comparing lists compares items by identity first, and calls == only if that fails.
                and [*map(own.get, names)] == values
                and all([(*map(f, *columns),) == old for f, columns, old in self._tables])
                and not any(self._empty)
                and self._containers == self._copies
                and [[*map(fact, tensors)] for fact in _FACTS] == self._facts
                and [*map(_VERSION, compress(tensors, self._frozen))] == self._versions
                and not any(map(Tensor.is_neg, tensors))
                and not any(map(Tensor.is_inference, tensors))
                and (not self._tied or all([tensors[i] is tensors[j] for i, j in self._tied]))
            )
            addresses = [*map(Tensor.data_ptr, tensors)] if holds else []
        except Exception:  # a tensor is gone or isn't a plain one, or values can't be compared
            return None
        if holds and addresses != self._addresses:
            # A bit of now ^ then is 1 where the addresses differ; the last 4 bits are modulo 16.
            moves = [now ^ then for now, then in zip(addresses, self._addresses, strict=True)]
            holds = not (at_their_places or any([move & 15 for move in moves]))
        return tensors if holds else None


def _is_strange(tensor: Tensor) -> bool:
    """Whether a guard can't compare this tensor, because it is more than memory with strides.

    Examples: a class that runs torch's operations itself (DTensor), a tensor inside of a transform
    (vmap, grad), or one made in inference mode, which has no version counter.
    """
    dispatches = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if dispatches or tensor.layout is not torch.strided or tensor.is_nested:
        return True
    if tensor.is_neg() or tensor.is_inference() or tensor.is_meta:
        return True
    try:
        tensor.data_ptr()
    except RuntimeError:  # a tensor inside of a transform has no address
        return True
    return False


class View(NamedTuple):
    """An input that is a view of a guarded tensor, stored without a reference to the tensor."""

    number: int  # index of the guarded tensor
    dtype: torch.dtype
    place: Any  # offset, size, strides

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The view, made again from the current guarded tensors."""
        tensor = tensors[self.number]
        blank = torch.empty(0, dtype=self.dtype, device=tensor.device)
        return blank.set_(tensor.untyped_storage(), *self.place)


class GuardedRecord:
    """A module's record, its guard, and a function for each kind of call made with it.

    A cached record holds no tensors.  Each call gets them from the guarded places.
    """

    def __init__(self, record: Record) -> None:
        self.record = record  # without outputs once it is cached, because outputs hold tensors
        self.calls: dict[Hashable, Known] = {}  # the key of x (``key_of_x``) -> its function
        self.guard: Guard | None = None  # None if the record can't be cached
        self._layouts = layouts_of(record.outputs)
        # Where each input comes from: the index of a guarded tensor, or a view of one.
        self._sources: list[int | View] = []
        self._has_views = False

    def __reduce__(self) -> tuple:
        """Copies and pickles hold no record, so that a copy of the module is read again."""
        return GuardedRecord, (Record("it wasn't read"),)

    def keep(self, guard: Guard) -> None:
        """Cache this record if later calls can locate every tensor that it uses.

        Each tensor must be in a guarded place, or be a frozen view of a tensor that is in one, such
        as a transposed weight.
        """
        if not guard.is_usable:
            return
        tensors, outputs = guard.tensors(), self.record.outputs
        numbers = {id(tensor): i for i, tensor in enumerate(tensors)}
        storages = {tensor.untyped_storage().data_ptr(): i for i, tensor in enumerate(tensors)}
        for tensor in flatten(outputs, self._layouts):
            number = numbers.get(id(tensor))
            if number is not None:
                self._sources.append(number)
                continue
            # Not in a guarded place itself: look for a guarded tensor with the same memory.
            number = storages.get(tensor.untyped_storage().data_ptr())
            # ``View.of`` passes no gradient on, so the guarded tensor must be frozen.  The view's
            # requires_grad doesn't show it: under no_grad it is False for a tensor that trains.
            if number is None or tensors[number].requires_grad or tensor.is_neg():
                return
            place = tensor.storage_offset(), tensor.shape, tensor.stride()
            self._sources.append(View(number, tensor.dtype, place))
            self._has_views = True
        self.guard = guard
        no_weight: Any = None  # the record must not keep tensors alive
        packed = [layer and layer._replace(weight=no_weight) for layer in self.record.packed]
        self.record = replace(self.record, outputs=(), packed=tuple(packed))

    def tensors_now(self, module: nn.Module) -> list[Tensor] | None:
        """The guarded tensors if the record is valid, else None."""
        return None if self.guard is None else self.guard.tensors_now(module, self._has_views)

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The flattened tensors of the record's outputs, made from the current guarded tensors."""
        return [
            tensors[each] if isinstance(each, int) else each.of(tensors) for each in self._sources
        ]

    def now(self, inputs: Sequence[Tensor]) -> Record:
        """The record with its outputs rebuilt from these flattened tensors."""
        return replace(self.record, outputs=tuple(unflatten(inputs, self._layouts)))


def record_of(module: Recorded) -> tuple[GuardedRecord, list[Tensor] | Record]:
    """(guarded record, contents) of a module.

    If the cached record is valid, contents are its flattened current tensors.  Otherwise the module
    is read, and contents are the new :class:`Record`.
    """
    own = vars(module)
    # setdefault, so that the guard built below counts this entry in the dict's length.
    cached: GuardedRecord | None = own.setdefault(_PLACE, None)
    if cached is not None:
        tensors = cached.tensors_now(module)
        if tensors is not None:
            return cached, cached.inputs(tensors)
    # The guard is built before the module is read.  If another thread changes the module in
    # between, the next comparison fails.
    guard = Guard(module, module.parts(), module.classes())
    record = module.read()
    guarded = GuardedRecord(record)
    own[_PLACE] = guarded
    guarded.keep(guard)
    return guarded, record


def call_recorded(module: Recorded, x: Tensor) -> Tensor | None:
    """The module's output for x; None if the module's own forward must run."""
    if torch.compiler.is_compiling():  # torch.compile has guards of its own
        return None if module.why_not(x) else module.run_new(x, module.read())[0]
    # A known call: its key is cached and its guard holds, so all checks below are skipped.
    key = key_of_x(x)
    cached: GuardedRecord | None = vars(module).get(_PLACE)
    if key is not None and cached is not None:
        known = cached.calls.get(key)
        # A global hook is the only condition of ``why_not`` that the key doesn't cover.
        if known is not None and not nn_module._has_any_global_hook():
            tensors = cached.tensors_now(module)
            if tensors is not None:
                return known([x, *cached.inputs(tensors)])
    if module.why_not(x):
        return None
    # Before the guard stores its dtype, cast a bias as the first call of a Linear4bit does.
    for part in module.parts():
        cast_bias(part, x)
    guarded, contents = record_of(module)
    record = contents if isinstance(contents, Record) else guarded.now(contents)
    y, known = module.run_new(x, record)
    if key is not None and known is not None and guarded.guard is not None:
        remember(guarded.calls, key, known, _MOST_CALLS)
    return y


def forget(module: nn.Module) -> None:
    """Remove the module's cached record."""
    vars(module).pop(_PLACE, None)


def fits_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether the fast path can multiply this x by this base weight [out, in].

    If it can't, PEFT's or torch's forward runs.
    """
    if not is_plain(x) or x.is_nested or x.layout is not torch.strided:
        return False
    if x.device != weight.device or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    if isinstance(weight, Quantized):
        return x.dtype in DTYPES
    return x.dtype == weight.dtype or (
        x.dtype in AUTOCAST_DTYPES
        and weight.dtype in AUTOCAST_DTYPES
        and torch.is_autocast_enabled(x.device.type)
    )
