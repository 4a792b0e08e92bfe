"""Dtypes: their names, and which 16-bit ones a CPU multiplies fast."""

import torch

from ..projection import DTYPES

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_FLAGS = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
HALF = tuple(_FLAGS)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_fast(dtype: torch.dtype) -> bool:
    """Whether torch says that oneDNN multiplies this 16-bit dtype on this CPU."""
    flag = getattr(torch.ops.mkldnn, _FLAGS[dtype], None)
    return flag is not None and bool(flag())
