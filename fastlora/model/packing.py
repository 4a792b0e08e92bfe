"""Packing a model's dense weights in place, and the report on what was packed."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..foreign import DDP, FSDP, FULLY_SHARDED
from ..formats.format import Quantised
from ..layers.expert_layer import take_packed, why_not_experts
from ..layers.frozen import matrix_of, why_not_base
from ..layers.members import is_hooked, twin
from ..layers.modules import called, inside_of, plain_name, some, unwrap
from ..layers.packed import packed_names, read_module, weight_in
from ..projection import shown
from ..quant import quantised_weight, vendor_of
from ..quant.packing import KINDS, pack_weight, packing_error
from ..report import columns
from .declare import declared, other_vendor
from .inject import check_model, check_plain
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


def bytes_of(weight: Quantised) -> int:
    return sum(tensor.nbytes for tensor in weight.tensors)


def pack(model: nn.Module, kind: str, modules: str | Sequence[str] | None = None) -> PackReport:
    """Pack dense weights of the model in place, and report what that took and saved.

    ``kind`` is "nf4", "mxfp4", "nvfp4" or "fp8" (:func:`fastlora.quant.packing.pack_weight`).
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
    records: list[PackedRecord] = []
    experts: list[tuple[nn.Module, dict[str, Quantised]]] = []
    linears: dict[nn.Module, nn.Module] = {}
    chosen = _chosen(model, modules)
    others = _held_by_others(model, chosen.values())
    for name, module in chosen.items():
        names = read_module(module).names if type(module) is not nn.Linear else ()
        reason = why_not_experts(module, names) if names else why_not_base(module)
        if packed_names(module) or quantised_weight(module) is not None:
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
            made = linears[module] = _packed_linear(called(name), module, kind)
            if other_vendor(model, vendor_of(made)):
                raise ValueError(
                    f"{called(name)} can't be packed as {kind}: the model has another vendor's "
                    "layers, and its quantization_config can't name both"
                )
            packed: Any = quantised_weight(made)
            if isinstance(packed, str):
                raise ValueError(f"{called(name)} can't be packed as {kind}: {packed}")
            records.append(_record(name, matrix_of(module), packed.weight))
            continue
        experts.append((module, {}))
        for parameter in names:
            where, dense = ".".join(filter(None, (name, parameter))), weight_in(module, parameter)
            dense = dense.mT if getattr(module, "is_transposed", False) else dense
            try:
                weight = experts[-1][1][parameter] = (
                    packed_on_meta(dense.shape, kind)
                    if dense.is_meta
                    else pack_weight(dense.detach(), kind)
                )
            except ValueError as error:
                raise ValueError(f"{where} can't be packed as {kind}: {error}") from None
            records.append(_record(where, dense, weight))
    # Nothing has changed so far, and nothing below can fail.
    with declared(model, linears.values()):
        put_linears(model, linears)
        for module, weights in experts:
            take_packed(module, weights)
    return PackReport(tuple(records))


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
    ids, packed = set[int](), set(chosen)  # modules are hashed by identity
    for module in model.modules():
        compiled = module._modules.get("_orig_mod")
        if isinstance(compiled, nn.Linear):  # another one in its place would never be called
            ids.add(id(compiled))
        if module not in packed:
            ids |= {
                id(parameter) for parameter in module._parameters.values() if parameter is not None
            }
    return ids


def _record(name: str, dense: Tensor, packed: Quantised) -> PackedRecord:
    error = None if dense.is_meta else packing_error(dense, packed)
    if error is not None and not math.isfinite(error):
        raise ValueError(f"{name} can't be packed: the weight has infinities or NaN")
    if error is not None:
        check_range(name, packed, dense.dtype)
    return PackedRecord(name, packed.format.label, dense.nbytes, bytes_of(packed), error)


def check_range(name: str, packed: Quantised, dtype: torch.dtype) -> None:
    """Raise ValueError where float16, of a model of that dtype, doesn't hold the packed numbers."""
    parts = (
        [packed.one(i) for i in range(len(packed.tensors[0]))] if packed.dim() == 3 else [packed]
    )
    if dtype == torch.float16 and not all(bool(one.dense(dtype).isfinite().all()) for one in parts):
        raise ValueError(
            f"{name} can't be {packed.format.label} in float16: its largest numbers, rounded to "
            "that, are beyond 65504: make the model bfloat16 first (model.bfloat16())"
        )


def record_of(name: str, dense: Tensor | Quantised, packed: Quantised) -> PackedRecord:
    """Of a weight whose numbers were packed elsewhere."""
    before = dense.shape.numel() * dense.dtype.itemsize
    return PackedRecord(name, packed.format.label, before, bytes_of(packed))


def put_linears(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Put these layers in the places of others."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in layers:
                parent._modules[key] = layers[child]


def packed_on_meta(shape: Sequence[int], kind: str) -> Quantised:
    """A stack [E, N, K] without numbers."""
    count, *one = shape
    format, tensors = KINDS[kind](torch.empty(*one, dtype=torch.float32, device="meta"))
    return Quantised(format, tuple([t.new_empty(count, *t.shape) for t in tensors]))


def _packed_linear(name: str, linear: Any, kind: str) -> nn.Module:
    """A layer in the place of this one, packed by its vendor."""
    package = {"nf4": "bitsandbytes", "fp8": "torchao"}.get(kind)
    if package is None:
        raise ValueError(
            f"{name} can't be packed as {kind}: torchao's linear layers of {kind} round their "
            "input, or aren't read: linear layers may be nf4 (bitsandbytes) or fp8 (torchao)"
        )
    try:
        theirs: Any = import_module("bitsandbytes.nn" if kind == "nf4" else "torchao.quantization")
    except ImportError as error:
        raise ImportError(
            f"{name} can't be packed as {kind} without {package}: "
            "pip install 'fastlora-kernels[quantised]'"
        ) from error
    if linear.weight.is_meta or is_hooked(linear):
        raise ValueError(f"{name} can't be packed: it is on meta, or something acts on its calls")
    if kind == "fp8":
        made: Any = nn.Sequential(twin(linear, nn.Linear))
        theirs.quantize_(made, theirs.Float8WeightOnlyConfig())
        return made[0]
    how = {"quant_type": "nf4", "compress_statistics": False}
    sizes = linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype
    made = theirs.Linear4bit(*sizes, **how, device="meta")
    weight = theirs.Params4bit(
        linear.weight.detach().cpu(), requires_grad=False, module=made, **how
    )
    made.weight, made.bias = weight.to(linear.weight.device), linear.bias
    return made.train(linear.training)
