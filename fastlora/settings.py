"""Checks of numbers and switches that callers set: rank, alpha, scale, dropout, True or False."""

import torch

from .text import shown

LARGEST_SCALE = torch.finfo(torch.float32).max
LARGEST_RANK = 2**31 - 1


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
    if not is_number(lora_alpha) or not -LARGEST_SCALE <= lora_alpha <= LARGEST_SCALE:
        raise ValueError(
            f"lora_alpha is {shown(lora_alpha)}, but must be a finite number: scaling is "
            "lora_alpha / r"
        )
    check_dropout(lora_dropout, "lora_dropout")
    check_switches(use_rslora=use_rslora)


def check_switches(**switches: bool) -> None:
    """Raise ValueError unless each argument is True or False."""
    for name, value in switches.items():
        if value is not True and value is not False:
            raise ValueError(f"{name} is {shown(value)}, but must be True or False")


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
