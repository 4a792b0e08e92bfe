"""Packing a model's weights: what is packed is taken in place here, and reported on."""

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..foreign import DDP, FSDP, FULLY_SHARDED
from ..formats import quantized_weight
from ..formats.format import Quantized
from ..formats.packing import KINDS, pack_weight, packing_error
from ..layers.expert_layer import take_packed, why_not_experts
from ..layers.experts import packed_names, read_module, stack_in
from ..layers.frozen import matrix_of, why_not_base
from ..layers.modules import called, full_name, ids_outside, inside_of, plain_name, some, unwrap
from ..projection import shown
from ..report import columns
from .declare import declared
from .inject import check_model, check_plain
from .packed_linears import pack_linear
from .targets import name_test

_MIB = 2**20


@dataclass(frozen=True)
class PackedRecord:
    """One weight: ``format`` is what its packed form is called, as "MXFP4".

    ``before`` and ``after``: bytes of the dense weight in the model's dtype, and of the packed one.
    ``error``: ‖packed - weight‖ / ‖weight‖; None where the dense weight has no numbers here.
    """

    name: str
    format: str
    before: int
    after: int
    error: float | None = None


@dataclass(frozen=True)
class PackReport:
    """A record for each packed weight; prints as a table that ends with totals.

    ``others``: bytes of all that was read beside them; ``notes`` are on the whole.
    """

    weights: tuple[PackedRecord, ...]
    others: int = 0
    notes: tuple[str, ...] = ()

    @property
    def before(self) -> int:
        return sum(weight.before for weight in self.weights)

    @property
    def after(self) -> int:
        return sum(weight.after for weight in self.weights)

    def __str__(self) -> str:
        rows = [(w.name, w.format, *_sizes(w), _percent(w.error)) for w in self.weights]
        worst = max((w.error for w in self.weights if w.error is not None), default=None)
        total = f"{len(rows)} weights", "", *_sizes(self), _percent(worst)
        lines = columns([_TITLES, *rows, total], left=2)
        if self.others:
            lines.append(f"all else: {self.others / _MIB:.1f} MiB")
        return "\n".join([*lines, *self.notes])


_TITLES = ("weight", "packed as", "MiB dense", "MiB packed", "error, %")


def _sizes(of: PackedRecord | PackReport) -> tuple[str, str]:
    return f"{of.before / _MIB:.1f}", f"{of.after / _MIB:.1f}"


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{100 * error:.2f}"


class Packing:
    """Packed weights for a model: all are made and checked before the first is taken in place.

    ``compares``: the weights in whose places they are have numbers, unless they are on meta.
    """

    def __init__(self, model: nn.Module, compares: bool) -> None:
        self.model, self.compares = model, compares
        self.records: list[PackedRecord] = []
        self._experts: dict[nn.Module, dict[str, Quantized]] = {}
        self._linears: dict[nn.Module, Any] = {}  # vendors', by those in whose places they are

    def add_weight(self, name: str, module: nn.Module, parameter: str, weight: Quantized) -> None:
        """Of experts.  Raises ValueError as :meth:`add_linear`."""
        self._experts.setdefault(module, {})[parameter] = weight
        self._record(name, stack_in(module, parameter), weight)

    def add_linear(self, name: str, linear: nn.Module, layer: Any) -> None:
        """A vendor's layer, which will have the bias of the one in whose place it is.

        Raises ValueError for infinities and NaN, and where float16, of a model of that dtype,
        doesn't hold the packed numbers.
        """
        self._linears[linear] = layer
        self._record(name, matrix_of(linear), matrix_of(layer))

    def _record(self, name: str, dense: Any, packed: Any) -> None:
        error = None
        if self.compares and not dense.is_meta:
            error = packing_error(dense, packed)
            if not math.isfinite(error):
                raise ValueError(f"{name} can't be packed: the weight has infinities or NaN")
        if dense.dtype == torch.float16 and packed.device.type != "meta":
            parts = map(packed.one, range(packed.shape[0])) if packed.dim() == 3 else [packed]
            if not all(bool(one.dense(torch.float16).isfinite().all()) for one in parts):
                raise ValueError(
                    f"{name} can't be {packed.format.label} in float16: its largest numbers, "
                    "rounded to that, are beyond 65504: make the model bfloat16 first "
                    "(model.bfloat16())"
                )
        before = dense.shape.numel() * dense.dtype.itemsize
        after = sum(tensor.nbytes for tensor in packed.tensors)
        self.records.append(PackedRecord(name, packed.format.label, before, after, error))

    def take(self) -> None:
        """Let the model have them, and say so; what may fail does so before anything changes."""
        with declared(self.model, self._linears.values()):
            for module, weights in self._experts.items():
                take_packed(module, weights)
            for linear, layer in self._linears.items():
                layer.bias = linear.bias
            for parent in list(self.model.modules()):
                for key, child in parent._modules.items():
                    if child is not None and child in self._linears:
                        parent._modules[key] = self._linears[child]


def pack(model: nn.Module, kind: str, modules: str | Sequence[str] | None = None) -> PackReport:
    """Pack dense weights of the model in place, and report what that took and saved.

    ``kind`` is "nf4", "mxfp4", "nvfp4" or "fp8" (:func:`fastlora.formats.packing.pack_weight`).
    ``modules`` names what to pack as PEFT's target_modules does: a regular expression for whole
    names, or a list of names or their last parts.  None: every experts module of transformers' that
    fastlora knows and that isn't packed.  Linear layers are packed by their vendors: "nf4" makes
    them bitsandbytes' ``Linear4bit``, "fp8" gives them torchao's ``Float8Tensor``.

    The packed weights are made before the dense ones go, so that a call that fails leaves the model
    as it was.  On meta nothing has numbers, and the shapes are packed.

    Raises TypeError for what is no module, ImportError where a vendor's package isn't there, and
    ValueError for another kind, a name that matches nothing or what is neither, a model with
    adapters (pack first, then :func:`fastlora.apply_lora`) or under FSDP or DDP, linear layers of
    the other kinds, a weight that something else has, too, and weights that don't fit a format's
    blocks or hold NaN or infinity.
    """
    check_model(model)
    wrapped, model = inside_of(model, FULLY_SHARDED, FSDP, DDP), unwrap(model)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind is {shown(kind)}, but must be one of {', '.join(KINDS)}")
    check_plain(model)
    packing, chosen = Packing(model, compares=True), _chosen(model, modules)
    others = _held_by_others(model, chosen.values())
    for name, module in chosen.items():
        names = read_module(module).names if type(module) is not nn.Linear else ()
        reason = why_not_experts(module, names) if names else why_not_base(module)
        if packed_names(module) or quantized_weight(module) is not None:
            reason = "it is packed already"
        if module in wrapped:
            reason = "FSDP or DDP has it already: pack first"
        held = [module, *[module._parameters.get(parameter) for parameter in names or ("weight",)]]
        if not others.isdisjoint(map(id, held)):
            reason = (
                "it is compiled, or tied to what isn't packed, which would keep its dense weight"
            )
        if reason:
            raise ValueError(f"{called(name)} can't be packed: {reason}")
        if not names:
            packing.add_linear(name, module, pack_linear(model, called(name), module, kind))
        for parameter in names:
            where, dense = full_name(name, parameter), stack_in(module, parameter)
            try:
                weight = (
                    packed_on_meta(dense.shape, kind)
                    if dense.is_meta
                    else pack_weight(dense.detach(), kind)
                )
            except ValueError as error:
                raise ValueError(f"{where} can't be packed as {kind}: {error}") from None
            packing.add_weight(where, module, parameter, weight)
    packing.take()
    return PackReport(tuple(packing.records))


def _chosen(model: nn.Module, modules: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """What is to be packed, by name."""
    named = {plain_name(name): module for name, module in model.named_modules()}
    experts = {name: module for name, module in named.items() if not read_module(module).reason}
    if modules is None:
        dense = {name: module for name, module in experts.items() if not packed_names(module)}
        if dense:
            return dense
        raise ValueError("the model has no dense experts that fastlora knows: say what in modules")
    if not isinstance(modules, str | Sequence | Set):
        raise ValueError(f"modules is {shown(modules)}, but must be a list of names, or a pattern")
    chosen: dict[str, nn.Module] = {}
    for one in [modules] if isinstance(modules, str) else [(each,) for each in modules]:
        test = name_test(one)
        matched = {name: module for name, module in named.items() if name and test(name)}
        if not matched:
            what = one if isinstance(one, str) else one[0]
            raise ValueError(f"modules has {shown(what)}, which matches no module")
        chosen |= matched
    others = [
        name for name in chosen if name not in experts and type(chosen[name]) is not nn.Linear
    ]
    if others:
        kind = type(chosen[others[0]]).__name__
        raise ValueError(
            f"{some(others)} can't be packed: a {kind} is neither experts that fastlora knows nor "
            "a torch.nn.Linear"
        )
    return chosen


def _held_by_others(model: nn.Module, chosen: Iterable[nn.Module]) -> set[int]:
    """The ids of parameters outside of the chosen modules, and of layers that are compiled."""
    compiled = [module._modules.get("_orig_mod") for module in model.modules()]
    # Another layer in the place of such a one would never be called.
    layers = {id(each) for each in compiled if isinstance(each, nn.Linear)}
    return layers | ids_outside(model, set(chosen))


def packed_on_meta(shape: Sequence[int], kind: str) -> Quantized:
    """A stack [E, N, K] without numbers."""
    count, *one = shape
    format, tensors = KINDS[kind](torch.empty(*one, dtype=torch.float32, device="meta"))
    return Quantized(format, tuple([t.new_empty(count, *t.shape) for t in tensors]))
