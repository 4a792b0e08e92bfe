"""Pack a model's dense weights in place, with a report: ``fastlora.pack``."""

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..common.other_packages import DDP, FSDP, FULLY_SHARDED
from ..common.text import columns, shown
from ..common.values import must
from ..formats import quantized_weight
from ..formats.format import Quantized
from ..formats.packing import KINDS, pack_weight, packing_error
from ..layers.experts_module import packed_names, read_module, stack_in
from ..layers.frozen import is_plain_linear, matrix_of, why_not_plain
from ..layers.modules import (
    REGEX_HINT,
    bypassed,
    called,
    check_model,
    check_plain,
    embeddings_of,
    full_name,
    inside_of,
    name_test,
    owners_of,
    plain_name,
    some,
    unwrap,
)
from ..layers.packed_experts import take_packed, why_not_experts
from .declarations import declared, is_vendors
from .linears import pack_linear

_MIB = 2**20


@dataclass(frozen=True)
class PackedRecord:
    """One packed weight; ``format`` is the format's name, such as "MXFP4".

    ``before``: bytes of the dense weight in the model's dtype.  ``after``: bytes of the packed
    weight.  ``error``: ‖packed - weight‖ / ‖weight‖; None if the dense weight has no values here.
    """

    name: str
    format: str
    before: int
    after: int
    error: float | None = None


@dataclass(frozen=True)
class PackReport:
    """A record for each packed weight; prints as a table that ends with totals.

    ``others``: bytes of all other tensors that were read.  ``notes``: lines below the table.
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
            lines.append(f"all other tensors: {self.others / _MIB:.1f} MiB")
        return "\n".join([*lines, *self.notes])


_TITLES = ("weight", "packed as", "MiB dense", "MiB packed", "error, %")


def _sizes(of: PackedRecord | PackReport) -> tuple[str, str]:
    return f"{of.before / _MIB:.1f}", f"{of.after / _MIB:.1f}"


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{100 * error:.2f}"


# By each weight's name: its module, the parameter's name in a module of experts ("" in a linear
# layer), and the packed weight, or the layer that replaces the linear layer.
Packed = dict[str, tuple[nn.Module, str, Any]]


def install(model: nn.Module, packed: Packed, compares: bool) -> tuple[PackedRecord, ...]:
    """Check all packed weights, install them, and update the model's quantization_config.

    A new layer gets the bias of the layer that it replaces.  ``compares``: whether to compute the
    error; it needs the dense weights' values, so weights on meta are skipped.

    Raises ValueError for infinities and NaN, also in float32 scales, and if the layer is float16
    and a packed value is too large for float16.  The model is then unchanged.
    """
    records, linears, experts = [], dict[nn.Module, Any](), dict[nn.Module, dict[str, Any]]()
    for name, (module, parameter, new) in packed.items():
        if parameter:
            experts.setdefault(module, {})[parameter] = new
            records.append(_record(name, stack_in(module, parameter), new, compares))
        else:
            linears[module] = new
            records.append(_record(name, matrix_of(module), matrix_of(new), compares))
    with declared(model, filter(is_vendors, linears.values())):
        for module, weights in experts.items():
            take_packed(module, weights)
        for linear, layer in linears.items():
            layer.bias = linear.bias
        # Replace a layer at all of its places.
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is not None and child in linears:
                    parent._modules[key] = linears[child]
    return tuple(records)


def _record(name: str, dense: Any, packed: Any, compares: bool) -> PackedRecord:
    error, numbers = None, [t for t in packed.tensors if t.dtype == torch.float32]
    is_finite = all(bool(t.isfinite().all()) for t in numbers if not t.is_meta)
    if compares and not dense.is_meta:
        error = packing_error(dense, packed)
        is_finite = is_finite and math.isfinite(error)
    if not is_finite:
        raise ValueError(f"{name} can't be packed: the weight has infinities or NaN")
    # Packed values are rounded, so they may exceed float16 where the dense ones don't.
    if dense.dtype == torch.float16 and packed.device.type != "meta":
        parts = map(packed.one, range(packed.shape[0])) if packed.dim() == 3 else [packed]
        if not all(bool(part.dense(torch.float16).isfinite().all()) for part in parts):
            raise ValueError(
                f"{name} can't be {packed.format.label} in float16: its largest values, after "
                "packing, are beyond 65504: make the model bfloat16 first (model.bfloat16())"
            )
    before = dense.shape.numel() * dense.dtype.itemsize
    after = sum(tensor.nbytes for tensor in packed.tensors)
    return PackedRecord(name, packed.format.label, before, after, error)


def pack(model: nn.Module, kind: str, modules: str | Sequence[str] | None = None) -> PackReport:
    """Pack dense weights of the model in place, and report each weight's size and error.

    ``kind`` is "nf4", "mxfp4", "nvfp4", "fp8" or "int8"
    (:func:`fastlora.formats.packing.pack_weight`).
    ``modules`` names the modules to pack, in the form of PEFT's target_modules: a regular
    expression that matches the whole name, or a list of names or last parts.  None packs every
    dense experts module of transformers that fastlora supports; with "int8", it packs every dense
    linear layer except the output head.  Vendors pack linear layers: "nf4" makes them bitsandbytes'
    ``Linear4bit``, and "fp8" gives them torchao's ``Float8Tensor``.  "int8" makes them layers of
    fastlora that multiply in 8 bits, which rounds their inputs also (docs/quantized.md).

    All packed weights are made before the first dense one is freed, so a call that fails leaves the
    model unchanged.  On meta, only shapes are packed.

    Raises TypeError if ``model`` is not a module, and ImportError if the vendor's package isn't
    installed.  Raises ValueError for

    * another kind, or mxfp4 or nvfp4 for linear layers;
    * a name that matches nothing, or a module that is neither experts nor a linear layer;
    * a model with adapters (pack it before), or under FSDP or DDP;
    * a weight that is tied to a module that isn't packed;
    * weights that don't fit the format's blocks, or that hold NaN or infinity.
    """
    check_model(model)
    wrapped, model = inside_of(model, FULLY_SHARDED, FSDP, DDP), unwrap(model)
    must(kind in [*KINDS], "kind", kind, f"one of {', '.join(KINDS)}")
    check_plain(model)
    packed, chosen = Packed(), _chosen(model, kind, modules)
    others = _held_by_others(model, chosen.values())
    for name, module in chosen.items():
        names = read_module(module).names if type(module) is not nn.Linear else ()
        reason = why_not_experts(module, names) if names else why_not_plain(module)
        if _is_packed(module):
            reason = "it is packed already"
        if module in wrapped:
            reason = "FSDP or DDP has it already: call fastlora.pack before wrapping the model"
        # By id, as _held_by_others: a compiled module, or a tied parameter.
        held = [module, *[module._parameters.get(parameter) for parameter in names or ("weight",)]]
        if not others.isdisjoint(map(id, held)):
            reason = (
                "it is compiled, or tied to a module that isn't packed, so its dense weight would "
                "stay in memory"
            )
        if reason:
            raise ValueError(f"{called(name)} can't be packed: {reason}")
        for parameter in names or ("",):
            where = full_name(name, parameter) if parameter else called(name)
            try:
                if not parameter:
                    new: Any = pack_linear(model, where, module, kind)
                elif (dense := stack_in(module, parameter).detach()).is_meta:
                    new = packed_on_meta(dense.shape, kind)
                else:
                    new = pack_weight(dense, kind)
            except ValueError as error:
                raise ValueError(f"{where} can't be packed as {kind}: {error}") from None
            packed[where] = module, parameter, new
    return PackReport(install(model, packed, compares=True))


def _chosen(
    model: nn.Module, kind: str, modules: str | Sequence[str] | None
) -> dict[str, nn.Module]:
    """The modules to pack, by name."""
    named = {plain_name(name): module for name, module in model.named_modules()}
    # read_module gives no reason against modules that are supported experts.
    experts = {name: module for name, module in named.items() if not read_module(module).reason}
    if modules is None:
        what = "experts that fastlora knows"
        dense = {name: module for name, module in experts.items() if not packed_names(module)}
        if kind == "int8":
            what, head, around = "linear layers", embeddings_of(model, "output"), bypassed(model)
            linear = {n: m for n, m in named.items() if is_plain_linear(m) and m is not head}
            dense = {name: module for name, module in linear.items() if name not in around}
        if dense:
            return dense
        is_packed = any(map(_is_packed, named.values() if kind == "int8" else experts.values()))
        hint = "it is packed already" if is_packed else "name modules to pack"
        raise ValueError(f"the model has no dense {what}: {hint}")
    must(isinstance(modules, str | Sequence | Set), "modules", modules, "a list of names")
    chosen: dict[str, nn.Module] = {}
    # Each entry of a list has its own test, so that the error names an entry without a match.
    for pattern in [modules] if isinstance(modules, str) else [(name,) for name in modules]:
        test = name_test(pattern)
        matched = {name: module for name, module in named.items() if name and test(name)}
        if not matched:
            what = pattern if isinstance(pattern, str) else pattern[0]
            hint = f": {REGEX_HINT}" if isinstance(pattern, str) else ""
            raise ValueError(f"modules has {shown(what)}, which matches no module{hint}")
        chosen |= matched
    others = [
        name
        for name, module in chosen.items()
        if not (name in experts or type(module) is nn.Linear or _is_packed(module))
    ]
    if others:
        other = type(chosen[others[0]]).__name__
        raise ValueError(
            f"{some(others)} can't be packed: a {other} is neither experts that fastlora knows nor "
            "a torch.nn.Linear"
        )
    return chosen


def _is_packed(module: nn.Module) -> bool:
    return bool(packed_names(module)) or quantized_weight(module) is not None


def _held_by_others(model: nn.Module, chosen: Iterable[nn.Module]) -> set[int]:
    """The ids of parameters outside of the chosen modules, and of compiled linear layers.

    A compiled wrapper keeps calling the layer that it compiled, so replacing it has no effect.
    """
    compiled = [module._modules.get("_orig_mod") for module in model.modules()]
    layers = {id(layer) for layer in compiled if isinstance(layer, nn.Linear)}
    return layers.union(owners_of(model, set(chosen)))


def packed_on_meta(shape: Sequence[int], kind: str) -> Quantized:
    """A packed stack [E, N, K] on meta: its format, and its tensors' shapes and dtypes."""
    # Pack one expert's matrix on meta, then put the axis of experts before each shape.
    count, *matrix = shape
    format, tensors = KINDS[kind](torch.empty(*matrix, dtype=torch.float32, device="meta"))
    return Quantized(format, tuple([t.new_empty(count, *t.shape) for t in tensors]))
