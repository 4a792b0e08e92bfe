"""Dtypes by their names."""

import torch

from ..projection import DTYPES

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
