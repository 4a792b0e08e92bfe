"""``fastlora.auto()``: every model that PEFT injects adapters into is optimized from then on.

This file imports only the standard library, because it runs at the start of programs that may never
import torch or PEFT.  Nothing here takes a lock, because a forked process would inherit it locked.
"""

import functools
import logging
import os
import sys
import warnings
from importlib import import_module
from typing import Any

_TUNERS = "peft.tuners.tuners_utils"  # the module of PEFT's BaseTuner
# The arguments of ``optimize``.  They are listed here because its signature would import torch.
SETTINGS = ("strict", "frozen_linears", "gated_mlps", "loss", "base", "int8_from")
_settings: dict[str, Any] | None = None  # the arguments of ``optimize``; None while ``auto`` is off
_wrapped: dict[type, Any] = {}  # class -> the wrapper of PEFT's ``inject_adapter``


def auto(on: bool = True, **settings: Any) -> None:
    """Optimize every model that PEFT gives LoRA layers from now on, in any program.

    Call it once, before or after ``import peft``, and before the program makes its PEFT model.
    ``settings`` are the arguments of :func:`fastlora.optimize`, such as ``gated_mlps=False``; a
    later call replaces them.  ``auto(False)`` switches this off.  Models that are optimized already
    stay optimized; :func:`fastlora.restore` restores them.

    For each model, the logger "fastlora" gets one line: the number of fast layers, and the reasons
    for the others.  Its level is INFO, or WARNING if no layer is fast.  An error in ``optimize``
    becomes such a warning and leaves the model as PEFT made it.  Another warning names the adapters
    that have no gradient in the first step.  Models of other tuners than LoRA don't change.

    ``auto`` wraps ``peft.tuners.tuners_utils.BaseTuner.inject_adapter``.  If PEFT isn't imported
    yet, it does so when the program imports PEFT.  ``auto`` imports neither torch nor PEFT.  The
    wrapper stays after ``auto(False)``, and only calls PEFT's function then.
    ``python -m fastlora run`` calls it for a program that can't be edited
    (docs/integrations.md).

    Raises TypeError for a setting that ``optimize`` doesn't take, and for an ``on`` that isn't True
    or False, and ValueError for a setting's value that doesn't fit.
    """
    from ..common.values import must

    global _settings
    check_settings(settings)
    what = "True or False: the settings of optimize are keyword arguments"
    must(on is True or on is False, "on", on, what, TypeError)
    _settings = settings if on else None
    if not on:
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    # Checked after the finder was added, because another thread may import PEFT in between.
    if _TUNERS in sys.modules:
        _wrap(import_module(_TUNERS))


def is_on() -> bool:
    """Whether :func:`auto` is on in this process."""
    return _settings is not None


def from_environment() -> None:
    """:func:`auto`, with the settings in ``FASTLORA``.  Raises ValueError as `settings_in`."""
    settings = settings_in(os.environ.get("FASTLORA", ""))
    if settings is not None:
        auto(**settings)
        show_log()


def settings_in(value: str) -> dict[str, Any] | None:
    """The settings in a value of ``FASTLORA``; None if it switches fastlora off.

    Raises ValueError for any other value than a switch or a JSON object of known settings.
    """
    if value.lower() in ("", "0", "false", "no", "off"):
        return None
    if value.lower() in ("1", "true", "yes", "on"):
        return {}
    import json

    try:
        settings = json.loads(value)
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or not settings.keys() <= {*SETTINGS}:
        known = ", ".join(SETTINGS)
        raise ValueError(
            f"FASTLORA is {value!r}, but must be 0, 1 or a JSON object with some of {known}"
        )
    try:
        check_settings(settings)
    except ValueError as error:
        raise ValueError(f"FASTLORA is {value!r}: {error}") from None
    return settings


def show_log() -> None:
    """Show the INFO lines of fastlora on stderr, unless the program's own handlers show them."""
    logger = logging.getLogger("fastlora")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.addFilter(lambda record: not _is_shown(record))
        handler.setFormatter(logging.Formatter("fastlora: %(message)s"))
        logger.addHandler(handler)


def _is_shown(record: Any) -> bool:
    """Whether a handler of the root logger writes the record to the terminal.

    A handler may drop INFO of other packages, or write to a file.  axolotl has one of each.
    """
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return any(
        record.levelno >= handler.level
        and handler.filter(record)
        and getattr(handler, "stream", sys.stderr) in streams
        for handler in logging.getLogger().handlers
    )


def optimize_silently(model: Any, **settings: Any) -> None:
    """:func:`fastlora.optimize` without its warnings, which the report repeats."""
    from ..peft.optimized import optimize

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimize(model, **settings)


def optimize_and_log(model: Any, **settings: Any) -> None:
    """:func:`fastlora.optimize`, with its report as one line of the log instead of warnings.

    After the first step, another line names the adapters that had no gradient.
    """
    from ..peft import is_disabled
    from ..peft.learning import watch
    from ..peft.optimized import coverage

    optimize_silently(model, **settings)
    watch(model, functools.partial(log_line, logging.WARNING))
    report = coverage(model)
    level, text = logging.INFO, "; ".join(str(report).splitlines())
    if settings.get("loss") and not report.loss:
        from ..layers.modules import unwrap
        from ..peft.head import why_no_lazy_head

        text += f"; loss with logits: {why_no_lazy_head(unwrap(model))}"
    if any(parameter.is_meta for parameter in model.parameters()):
        text = f"{len(report.layers)} LoRA layers; fastlora.coverage(model) can tell which are fast"
        text += " when their weights are loaded"
    elif len(report.not_fast) == len(report.layers) and not is_disabled():
        level = logging.WARNING
    log_line(level, text)


def optimize_or_log(model: Any, **settings: Any) -> None:
    """:func:`optimize_and_log`, with a line of the log in place of an error."""
    try:
        optimize_and_log(model, **settings)
    except Exception as error:
        log_line(logging.WARNING, f"this model isn't optimized: {type(error).__name__}: {error}")


def log_line(level: int, text: str) -> None:
    """Log the text: at this level in the first process of a group, at DEBUG in the others."""
    is_first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("fastlora").log(level if is_first else logging.DEBUG, text)


def check_settings(settings: dict[str, Any]) -> None:
    """Raise TypeError for a setting that ``optimize`` doesn't take, ValueError for a bad value."""
    from ..common.values import check_optimize

    for name in settings:
        if name not in SETTINGS:
            raise TypeError(f"optimize has no setting {name!r}: give some of {', '.join(SETTINGS)}")
    check_optimize(**settings)


def _wrap(tuners: Any) -> None:
    """Wrap ``inject_adapter``, once for each class, and stop waiting for PEFT's import."""
    # A new list, because another thread may be in a loop over the old one.
    sys.meta_path = [finder for finder in sys.meta_path if finder is not _FINDER]
    kind = tuners.BaseTuner
    theirs = kind.inject_adapter

    @functools.wraps(theirs)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *rest: Any, **named: Any) -> Any:
        settings = _settings
        if settings is None:
            return theirs(self, model, adapter_name, *rest, **named)
        from ..peft.inject import shown_if_packed
        from ..peft.targets import peft_layers

        with shown_if_packed(model, self.peft_config[adapter_name]):
            result = theirs(self, model, adapter_name, *rest, **named)
        if peft_layers(model):  # none if the tuner isn't LoRA's
            optimize_or_log(model, **settings)
        return result

    # setdefault is atomic, because another thread may be here also.
    if _wrapped.setdefault(kind, inject_adapter) is inject_adapter:
        kind.inject_adapter = inject_adapter


class _Finder:
    """A finder of ``sys.meta_path`` that calls :func:`_wrap` when PEFT's module has been executed.

    It finds the module by the other finders.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _TUNERS:
            return None
        others = [each for each in sys.meta_path if each is not self and hasattr(each, "find_spec")]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        loader: Any = getattr(spec, "loader", None)
        run: Any = getattr(loader, "exec_module", None)

        def exec_module(module: Any) -> None:
            vars(loader).pop("exec_module", None)
            run(module)
            # A loader may load other modules with the same function.
            if module.__name__ == _TUNERS and _settings is not None:
                _wrap(module)

        if run is not None:
            loader.exec_module = exec_module
        return spec


_FINDER = _Finder()
