"""get_peft_model and load_adapter: PEFT injects adapters on every base that fastlora reads.

PEFT derives an adapter's sizes and dtype from a floating weight of its base.  While PEFT injects, a
packed weight that PEFT can't read is therefore shown as a float32 parameter of its dense shape: one
element in memory, expanded.

Importing this file doesn't import PEFT.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from copy import copy, deepcopy
from itertools import accumulate
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import PackedLayer, quantized_weight
from ..layers.classes import change_class
from ..layers.experts_module import (
    lies_transposed,
    packed_names,
    read_module,
    sort_weights,
    stack_in,
)
from ..layers.int8 import Int8Linear
from ..layers.modules import (
    REGEX_HINT,
    bypassed,
    check_model,
    check_places,
    name_test,
    owners_of,
    some,
)
from ..packing.checkpoints import check_keys
from ..packing.files import read_adapter, read_header, read_tensors
from . import why_no_injection, why_nothing_changes
from .optimized import optimize
from .targets import is_linear, linear_layers, matched, peft_layers, resolve_targets
from .trainable import admit_training

# PEFT has its own layers for linear layers of these packages, and for these tensors of torchao.
_PEFT_PACKAGES = ("bitsandbytes", "hqq", "gptqmodel")
_PEFT_TENSORS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
# Initializations that don't read the base's weight.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    **settings: Any,
) -> Any:
    """PEFT's ``get_peft_model``, then :func:`fastlora.optimize`; returns the PeftModel.

    ``peft_config`` is a ``peft.LoraConfig``, which isn't written to.  The arguments up to
    ``low_cpu_mem_usage`` are those of ``peft.get_peft_model``.  ``settings`` are those of
    :func:`fastlora.optimize`, such as ``loss=True``.  If ``model`` is a PeftModel, it gets another
    adapter, as by ``add_adapter``: ``set_adapter`` activates it.

    Bases that PEFT's own function refuses or passes over get adapters also: GGUF layers, FP8Linear,
    torchao's Int4Tensor, fastlora's 8-bit layers, and packed experts that ``target_parameters``
    names (docs/quantized.md, docs/experts.md).  Their adapters are float32.
    ``target_modules="all-linear"`` includes such layers, and leaves out the routers of mixtures.
    Experts may have ``lora_dropout``.  The saved config then has 0, because PEFT refuses to load
    any other value.

    Raises ImportError without PEFT 0.20 or newer, and TypeError for other models and configs.
    Raises ValueError if a name in ``target_modules``, ``target_parameters`` or ``modules_to_save``
    matches nothing, if a target is at two places in the model, if the module around it reads its
    weight without calling it, or if DoRA or an initialization would read a packed weight.  Also
    raises PEFT's errors, and those of :func:`fastlora.optimize`.  An error leaves the model
    unchanged.
    """
    _check(model, peft_config)
    import peft

    # A copy, because targets are resolved in it.  PEFT changes it, and keeps it in the model.
    config, base = deepcopy(peft_config), _base_of(model)
    wanted = matched(base, config)  # layers that target_modules names
    options: Any = {"low_cpu_mem_usage": low_cpu_mem_usage}
    options["autocast_adapter_dtype"] = autocast_adapter_dtype
    with _undone_on_error(model, adapter_name):
        with shown_dense(base, config):
            _check_names(base, peft_config, config)
            # PEFT refuses dropout beside target_parameters: inject without it, and add it below.
            dropout = config.lora_dropout if config.target_parameters else 0.0
            if dropout:
                config.lora_dropout = 0.0
            if isinstance(model, peft.PeftModel):
                model.add_adapter(adapter_name, config, **options)
                peft_model: Any = model
            else:
                options |= {"mixed": mixed, "revision": revision}
                peft_model = peft.get_peft_model(model, config, adapter_name, **options)
        _check_layers(base, adapter_name, wanted)
        if dropout:
            _add_dropout(base, adapter_name, dropout)
        optimize(peft_model, **settings)
        admit_training(base)
        return peft_model


def _add_dropout(base: nn.Module, adapter: str, p: float) -> None:
    """Set the dropout of every layer's adapter after PEFT's injection.

    PEFT's injection refuses dropout for the weights of experts, so it runs with dropout 0.
    """
    for name, layer in peft_layers(base):
        if adapter not in layer.lora_dropout:
            continue
        owner = layer.get_base_layer()
        reason = why_nothing_changes() or read_module(owner).reason
        if reason and hasattr(layer, "parameter_name"):
            raise ValueError(
                f"lora_dropout is {p}, but the adapter of {layer.parameter_name} in {name}, a "
                f"{type(owner).__name__}, can't have dropout ({reason}): set it to 0, or leave "
                "this target out"
            )
        layer.lora_dropout[adapter] = nn.Dropout(p)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    config: Any = None,
    autocast_adapter_dtype: bool = True,
    **settings: Any,
) -> Any:
    """Load a LoRA adapter onto any base that :func:`get_peft_model` takes; returns the PeftModel.

    ``folder``: a folder with PEFT's files, or a name on the Hugging Face hub.  ``model``: the base
    model; or a PeftModel, which gets another adapter.  ``is_trainable``: whether the adapter trains
    on, as in ``PeftModel.from_pretrained``.  ``settings`` are those of :func:`fastlora.optimize`.

    ``config`` is only for a Trainer's checkpoint of a whole model that fastlora 0.1 to 0.4 trained.
    Such a checkpoint has no config file, so give the ``peft.LoraConfig`` of its training.

    Raises FileNotFoundError for a folder without the files.  Raises ValueError if a tensor of the
    adapter is missing in the files, or if a tensor in them is unknown to the model, has another
    shape than in the model, or has NaN or infinity.  Also raises the errors of
    :func:`get_peft_model`, but names of the saved config may match nothing.  An error leaves the
    model unchanged.
    """
    _check(model, config)
    if config is not None:
        config = copy(config)
        config.inference_mode = not is_trainable
        with _undone_on_error(model, adapter_name):
            options: Any = {"autocast_adapter_dtype": autocast_adapter_dtype}
            peft_model = get_peft_model(model, config, adapter_name, **options, **settings)
            _load_whole(_base_of(peft_model), Path(folder), adapter_name)
            return peft_model if is_trainable else peft_model.eval()
    import peft
    from peft.utils.save_and_load import load_peft_weights

    # A local folder must have safetensors.  PEFT would also load a pickle, which can run code.
    if Path(folder).exists():
        read_adapter(folder)
    config = peft.PeftConfig.from_pretrained(os.fspath(folder))
    _check(model, config)
    config.inference_mode = not is_trainable
    tensors = load_peft_weights(os.fspath(folder), device="cpu")
    _check_finite(tensors, folder)
    options, base = {"autocast_adapter_dtype": autocast_adapter_dtype}, _base_of(model)
    with _undone_on_error(model, adapter_name):
        with shown_dense(base, config), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            warnings.filterwarnings("ignore", "Some weights of .*ignore_mismatched_sizes")
            if isinstance(model, peft.PeftModel):
                model.add_adapter(adapter_name, config, **options)
                peft_model = model
            else:
                load = peft.PeftModel.from_pretrained
                options |= {"config": config, "is_trainable": is_trainable}
                # Other shapes are an error below, which names one tensor.
                options["ignore_mismatched_sizes"] = True
                peft_model = load(model, os.fspath(folder), adapter_name, **options)
            # The adapter's own tensors have other keys in its file than in the model's state dict.
            expected = peft.get_peft_model_state_dict(
                peft_model, adapter_name=adapter_name, save_embedding_layers=False
            )
            _check_shapes(tensors, peft_model.state_dict() | expected, folder)
            loaded = peft.set_peft_model_state_dict(peft_model, tensors, adapter_name)
        # Base weights are also "missing" in an adapter's file: only this adapter's tensors count.
        own = [key for key in loaded.missing_keys if f".{adapter_name}" in key]
        missing = [key for key in own if "lora_" in key or ".modules_to_save." in key]
        check_keys(folder, missing, loaded.unexpected_keys)
        _check_layers(base, adapter_name, set())
        optimize(peft_model, **settings)
        admit_training(base)
        return peft_model if is_trainable else peft_model.eval()


def _load_whole(base: nn.Module, folder: Path, adapter: str) -> None:
    """Load a checkpoint of a whole model whose adapters have the names of fastlora 0.1 to 0.4.

    These are NAME.lora_A of a layer, and NAME_lora_A of a weight of experts.
    """
    # ``expected``: key in the checkpoint -> the model's tensor.  The adapters' tensors come first.
    expected: dict[str, nn.Parameter] = {}
    for name, layer in peft_layers(base):
        parameter = getattr(layer, "parameter_name", "")
        owner = name.replace(".base_layer", "")
        start = f"{owner}.{parameter}_lora_" if parameter else f"{owner}.lora_"
        for x, pair in (("A", layer.lora_A), ("B", layer.lora_B)):
            if adapter in pair:
                expected[start + x] = pair[adapter].weight
    # Then all others, without PEFT's insertions into names.  original_module is PEFT's second copy
    # of a module in modules_to_save.
    for name, tensor in base.named_parameters(remove_duplicate=False):
        if ".original_module." not in name and ".lora_" not in name:
            key = name.replace(".base_layer", "").replace(f".modules_to_save.{adapter}", "")
            expected[key] = tensor
    stored = {key: path for path in folder.glob("*.safetensors") for key in read_header(path)}
    if not stored:
        raise FileNotFoundError(f"{folder} has no safetensors file: give a checkpoint's folder")
    known = {key: path for key, path in stored.items() if key in expected}
    tensors = {key: read_tensors(path, [key])[key] for key, path in known.items()}
    _check_finite(tensors, folder)
    found = {id(expected[key]) for key in tensors}  # one key of a tied tensor is enough
    missing = [key for key, tensor in expected.items() if id(tensor) not in found]
    buffers = {name.replace(".base_layer", "") for name, _ in base.named_buffers()}
    check_keys(folder, missing, [key for key in stored if key not in expected.keys() | buffers])
    _check_shapes(tensors, expected, folder)
    with torch.no_grad():
        for key, value in tensors.items():
            expected[key].copy_(value)


def _check_finite(tensors: Mapping[str, Tensor], folder: Any) -> None:
    """Raise ValueError if a tensor of an adapter's files has NaN or infinity."""
    if broken := [key for key, one in tensors.items() if not one.float().isfinite().all()]:
        raise ValueError(f"{folder} has NaN or infinity in {some(broken)}: the adapter is broken")


def _check_shapes(tensors: Mapping[str, Tensor], model: Mapping[str, Tensor], folder: Any) -> None:
    """Raise ValueError if a tensor of an adapter's files has another shape than the model's."""
    for key, tensor in tensors.items():
        shape, own = tuple(tensor.shape), tuple(model.get(key, tensor).shape)
        if shape != own:
            raise ValueError(
                f"{key} has shape {shape} in {folder}, but {own} in the model: load the adapter "
                "onto the base model that it was trained on"
            )


def _base_of(model: Any) -> Any:
    """The model whose layers get adapters: PEFT's base model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check(model: Any, config: Any = None) -> None:
    check_model(model)
    if reason := why_no_injection():
        raise ImportError(reason)
    import peft

    if config is not None and not isinstance(config, peft.LoraConfig):
        kind = type(config).__name__
        raise TypeError(f"peft_config is a {kind}, but fastlora's fast layers need peft.LoraConfig")
    if config is not None and not isinstance(config.r, Integral):
        raise TypeError(f"r is {config.r!r}, but the rank must be a whole number, such as 8")


@contextmanager
def shown_dense(model: nn.Module, config: Any) -> Iterator[None]:
    """Inside, packed weights of the model look dense, so that PEFT can inject adapters over them.

    ``config`` is changed: targets such as "all-linear" are replaced by names of the model
    (:func:`.resolve_targets`).  Raises ValueError if PEFT would read a packed weight's elements.
    """
    from peft.tuners import lora

    from .experts import run_packed

    # PEFT's table of (a layer's class -> the class of its wrapper), for classes it doesn't know.
    before, custom, linear = config._custom_modules, dict[Any, Any](), linear_layers(model)
    with ExitStack() as undo:
        undo.callback(setattr, config, "_custom_modules", before)
        packed_weights = []  # (module's name, weight's name, module)
        for owner, module in list(model.named_modules()):
            shapes = _packed_shapes(module)
            # For bitsandbytes, PEFT either computes an initialization or raises its own error.  For
            # its other packages it does neither, so their layers are checked below.
            is_unchecked = _is_peft_s(module) and not type(module).__module__.startswith(
                "bitsandbytes"
            )
            names = [*shapes] or ["weight"] * is_unchecked
            packed_weights += [(owner.replace(".base_layer", ""), name, module) for name in names]
            if "weight" in shapes and not isinstance(module, nn.Linear):
                custom[type(module)] = lora.Linear
            if shapes:
                _show(module, shapes, undo)
        resolve_targets(model, config, linear)
        for owner, name, module in packed_weights:
            _refuse_reading(owner, name, module, config)
        if custom:
            config._custom_modules = {**custom, **(before or {})}
        yield
    run_packed(model)


@contextmanager
def shown_if_packed(model: nn.Module, config: Any) -> Iterator[bool]:
    """:func:`shown_dense`, but only if ``config`` is a LoRA's and PEFT can't read some weights.

    Yields whether that is so.
    """
    is_lora = hasattr(config, "_custom_modules") and not why_no_injection()
    is_packed = is_lora and any(_packed_shapes(module) for module in model.modules())
    with shown_dense(model, config) if is_packed else nullcontext():
        yield is_packed


def _packed_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The dense shape of each packed weight of the module that PEFT can't read, by name."""
    packed = quantized_weight(module)
    if isinstance(packed, PackedLayer):
        return {} if _is_peft_s(module) else {"weight": tuple(packed.weight.shape)}
    if not (names := packed_names(module)) or read_module(module).reason:
        return {}
    is_transposed = lies_transposed(module)
    # Experts: a stack [E, N, K] for each name; transformers may declare it as [E, K, N].
    shapes = {name: stack_in(module, name).shape for name in names}
    return {n: (E, K, N) if is_transposed else (E, N, K) for n, (E, N, K) in shapes.items()}


def _is_peft_s(module: nn.Module) -> bool:
    """Whether PEFT has its own LoRA layer for this packed linear layer."""
    weight = type(module._parameters.get("weight")).__name__
    return type(module).__module__.startswith(_PEFT_PACKAGES) or weight in _PEFT_TENSORS


def _refuse_reading(owner: str, name: str, module: nn.Module, config: Any) -> None:
    """Raise ValueError if PEFT would read or copy the elements of this packed weight.

    It would for three settings.  Where PEFT has its own layer for the weight, only the first is
    refused:

    * an initialization that computes from the weight (not in _PLAIN_INITS), if it is a target;
    * DoRA, if it is a target;
    * ``modules_to_save``, which copies whole modules, if the module or one around it is named.
    """
    from peft.tuners.tuners_utils import check_target_module_exists as matches

    init, reader, is_peft_s = config.init_lora_weights, "", _is_peft_s(module)
    weights = tuple(f".{each}" for each in config.target_parameters or ())
    if matches(config, owner) or f".{owner}.{name}".endswith(weights):
        reader = "" if init in _PLAIN_INITS else f"init_lora_weights={init!r}"
        reader = "use_dora=True" if config.use_dora and not is_peft_s else reader
    # For owner "a.b.c", the names "a", "a.b" and "a.b.c": the module, and the modules around it.
    outer = [*accumulate(owner.split("."), "{}.{}".format)]
    saved = [one for one in config.modules_to_save or () if any(n.endswith(one) for n in outer)]
    reader = f"modules_to_save={saved}" if saved and not is_peft_s else reader
    if reader:
        weight: Any = module._parameters.get("weight")
        kind = type(weight if type(weight).__name__ in _PEFT_TENSORS else module).__name__
        hint = "; fastlora.restore(model) makes PEFT's layers in 8 bits dense"
        raise ValueError(
            f"{reader} needs the dense weight, which PEFT can't read in {owner}, a "
            f"{kind}: leave this setting out, or the layer"
            f"{hint if isinstance(module, Int8Linear) else ''}"
        )


def _show(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], undo: ExitStack) -> None:
    """Replace packed weights by parameters of these dense shapes, until ``undo`` closes.

    A parameter has one element in memory, expanded.  PEFT gives its dtype to the adapter: float32,
    or the dtype of an ``Int8Linear``.  Afterwards the packed weights are frozen, as PEFT freezes
    weights that it sees.
    """
    tensors = (*module.buffers(), *module.parameters())
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = module.format.dtype if isinstance(module, Int8Linear) else torch.float32
    zero = torch.zeros((), dtype=dtype, device=device)
    tables: tuple[dict[str, Any], ...] = module._parameters, module._modules
    # An ExitStack calls the last callback first: clear, then update with a copy from before.
    for members in tables:
        undo.callback(members.update, dict(members))
        undo.callback(members.clear)
    for name, shape in shapes.items():
        packed = module._parameters.get(name)
        if packed is not None:
            undo.callback(packed.requires_grad_, False)
        module._modules.pop(name, None)
        module._parameters[name] = nn.Parameter(zero.expand(*shape), requires_grad=False)
    sort_weights(module)


def _check_names(model: nn.Module, config: Any, resolved: Any) -> None:
    """Raise ValueError if a name in the config matches nothing in the model.

    ``resolved``: the config after :func:`.resolve_targets`.  A name that this replaced has matched.
    """
    modules = [name.replace(".base_layer", "") for name, _ in model.named_modules()]
    weights = [name.replace(".base_layer", "") for name, _ in model.named_parameters()]
    for field, names in (
        ("target_modules", modules), ("modules_to_save", modules), ("target_parameters", weights)
    ):  # fmt: skip
        given = getattr(config, field) or ()
        kept: Any = getattr(resolved, field) or ()
        # target_modules may be one regular expression in place of a list.
        is_regex = isinstance(kept, str)
        # In a list, check only names that were not replaced, because a replaced name has matched.
        for wanted in [kept] if is_regex else [name for name in given if name in kept]:
            if not any(map(name_test(wanted if is_regex else [wanted]), names)):
                ends = {name.rpartition(".")[2] for name in names} - {"", "weight", "bias"}
                some_ends = ", ".join(sorted(n for n in ends if not n.isdigit())[:20])
                hint = f"{REGEX_HINT}; " if is_regex else ""
                raise ValueError(
                    f"{field} has {wanted!r}, which matches nothing in the {type(model).__name__}: "
                    f"{hint}the ends of names are {some_ends}"
                )


def _check_layers(base: nn.Module, adapter: str, wanted: set[str]) -> None:
    """Raise ValueError if an adapter would have no effect at some place, or in some mode.

    Warns of tied weights, and of ``wanted`` layers without an adapter.
    """
    layers = {n: m for n, m in peft_layers(base) if adapter in getattr(m, "lora_A", ())}
    around = bypassed(base)
    # A module such as MultiheadAttention reads out_proj.weight itself, without calling out_proj.
    for name in layers.keys() & around.keys():
        outer = name.rpartition(".base_layer")[0]
        if outer not in layers:  # PEFT has a layer for a whole MultiheadAttention
            raise ValueError(
                f"{name} can't take an adapter: the {around[name]} around it reads its weight "
                "without calling it, so the adapter would be skipped in evaluation"
            )
    check_places(base, [layer.get_base_layer() for layer in layers.values()], ())
    owners = owners_of(base)
    # Layers whose base weight is also the weight of another module.
    shared = [
        name for name, layer in layers.items()
        for weight in [layer.get_base_layer()._parameters.get("weight")]
        if weight is not None and owners[id(weight)] > 1
    ]  # fmt: skip
    if shared:
        warnings.warn(
            f"the weight of {some(shared)} is tied to another module's, which stays without the "
            "adapter: merging would change both, and files for vLLM can't say it",
            stacklevel=4,
        )
    without = sorted(wanted - {name for name, _ in peft_layers(base)})
    if lost := [name for name in without if is_linear(base.get_submodule(name))]:
        warnings.warn(
            f"{len(lost)} layers get no adapter ({some(lost)}): in this architecture PEFT reads "
            "their names as those of experts",
            stacklevel=4,
        )


@contextmanager
def injected(model: nn.Module, config: Any, **settings: Any) -> Iterator[Any]:
    """Inside, the model has adapters and is optimized; afterwards it is as before.

    Yields the PeftModel.
    """
    # _undone_on_error restores after every error: _Undo, or one of the caller's own code.
    with suppress(_Undo), _undone_on_error(model, "default"):
        yield get_peft_model(model, config, **settings)
        raise _Undo


class _Undo(Exception):  # noqa: N818
    """Raised at the end of :func:`injected`, so that ``_undone_on_error`` restores the model."""


@contextmanager
def _undone_on_error(model: Any, adapter: str) -> Iterator[None]:
    """Restore the model if the code inside raises: its modules, classes, hooks and frozen state.

    Raises ValueError if the model has an adapter of this name already.
    """
    if adapter in (getattr(model, "peft_config", None) or {}):
        raise ValueError(f"the model has an adapter {adapter!r} already: give another adapter_name")
    modules = dict(model.named_modules())
    kinds = {m: (type(m), m.training, {**m._forward_hooks}) for m in modules.values()}
    trained = [(p, p.requires_grad) for p in model.parameters()]
    attributes = dict(vars(model))
    try:
        yield
    except BaseException:
        # First PEFT deletes the adapter from layers that had other adapters before.
        if hasattr(model, "delete_adapter"):
            with suppress(Exception):
                model.delete_adapter(adapter)
        # Put each module back under its old name in its old parent, in place of PEFT's wrapper.
        for name, module in reversed([*modules.items()]):
            outer, _, last = name.rpartition(".")
            if name:
                setattr(modules[outer], last, module)
            kind, module.training, hooks = kinds[module]
            for number in module._forward_hooks.keys() - hooks.keys():
                del module._forward_hooks[number]
            if type(module) is not kind:
                change_class(module, kind)
        vars(model).clear()
        vars(model).update(attributes)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
