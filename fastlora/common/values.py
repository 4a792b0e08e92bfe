"""Checks of numbers and switches that callers set: rank, alpha, scale, dropout, True or False."""

import warnings
from functools import wraps
from inspect import signature
from typing import Any

from .text import shown

LARGEST_SCALE = (2 - 2**-23) * 2.0**127  # the largest float32
LARGEST_RANK = 2**31 - 1


def must(
    fits: bool, name: str, value: object, what: str, error: type[Exception] = ValueError
) -> None:
    """Raise the error unless the value of the argument ``name`` fits."""
    if not fits:
        raise error(f"{name} is {shown(value)}, but must be {what}")


def check_dropout(dropout: float, name: str = "dropout") -> None:
    """Raise ValueError unless this is a probability below 1."""
    if not is_number(dropout) or not 0.0 <= dropout < 1.0:
        raise ValueError(
            f"{name} is {shown(dropout)}, but must lie in [0, 1): the probability of dropping "
            "an input, a number"
        )


def check_settings(
    r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool = False
) -> None:
    """Raise ValueError for an invalid rank, alpha, dropout or rsLoRA switch."""
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= LARGEST_RANK:
        raise ValueError(
            f"r is {shown(r)}, but the rank must be a whole number of at least 1 and below 2³¹"
        )
    is_finite = is_number(lora_alpha) and -LARGEST_SCALE <= lora_alpha <= LARGEST_SCALE
    must(is_finite, "lora_alpha", lora_alpha, "a finite number: scaling is lora_alpha / r")
    check_dropout(lora_dropout, "lora_dropout")
    check_switches(use_rslora=use_rslora)


def check_switches(**switches: bool) -> None:
    """Raise ValueError unless each argument is True or False."""
    for name, value in switches.items():
        must(value is True or value is False, name, value, "True or False")


def check_optimize(base: Any = None, int8_from: Any = 0, loss: Any = None, **others: bool) -> None:
    """Raise ValueError unless these are values for the arguments of ``fastlora.optimize``."""
    check_switches(**others, loss=loss is not None and loss)
    must(base in (None, "int8"), "base", base, '"int8", or None for no change')
    must(is_number(int8_from) and int8_from >= 0, "int8_from", int8_from, "a number of features")


def is_number(value: object) -> bool:
    """Whether it is an int or a float (numpy.float64 is a float), and not a bool."""
    return type(value) is float or (isinstance(value, int | float) and type(value) is not bool)


def check_scale(scale: float) -> None:
    """Raise ValueError unless this is a number that float32 can hold."""
    if not is_number(scale) or not abs(scale) <= LARGEST_SCALE:  # false for NaN
        raise ValueError(
            f"scale is {shown(scale)}, but must be a finite float32: alpha / r, or alpha / √r for "
            "rsLoRA"
        )


def suggests_arguments(kind: type) -> type:
    """Let the TypeError for an unknown argument of the class list the arguments."""
    init: Any = vars(kind)["__init__"]
    known = [*signature(init).parameters][1:]

    @wraps(init)
    def checked(self: Any, *values: Any, **settings: Any) -> None:
        if unknown := sorted(settings.keys() - {*known}):
            raise TypeError(
                f"{kind.__name__} has no {', '.join(map(repr, unknown))}: its arguments are "
                f"{', '.join(known)}; other settings of peft.LoraConfig need PEFT"
            )
        init(self, *values, **settings)

    kind.__init__ = checked  # type: ignore[misc]
    return kind


def doubt_of(scaling: Any, r: int, sizes: tuple[float, ...]) -> str:
    """Why these settings of an adapter can't be meant; "" if they can.

    ``scaling``: any multiple of lora_alpha.
    """
    if is_number(scaling) and scaling == 0:
        return "the scaling is 0 (lora_alpha), so the adapter has no effect and doesn't learn"
    if r > max(sizes):
        return f"r is {r}, above both sizes of the layer: rank {min(sizes)} can express any change"
    return ""


def warn_of(lora_alpha: float, r: int, sizes: tuple[int, ...]) -> None:
    """Warn if :func:`doubt_of` gives a reason."""
    if doubt := doubt_of(lora_alpha, r, sizes):
        warnings.warn(doubt, stacklevel=4)
