"""Values of every kind, for arguments that are meant to be of another."""

import math
import re
import traceback
from collections.abc import Callable, Collection, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fastlora

PACKAGE = str(Path(fastlora.__file__).parent)


class WithoutRepr:
    """It can't be shown, nor compared."""

    __hash__ = None

    def __repr__(self):
        raise RuntimeError("no repr")

    def __eq__(self, other):
        raise RuntimeError("no comparison")


def values() -> dict[str, object]:
    """Made anew, since some are used up."""
    return {
        "none": None,
        "text": "a",
        "empty-text": "",
        "long-text": "a" * 10**5,
        "bytes": b"a",
        "empty-bytes": b"",
        "list": [0.5],
        "empty-list": [],
        "list-of-none": [None],
        "dict": {},
        "set": {1},
        "iterator": iter(["up"]),
        "object": object(),
        "class": float,
        "module": nn.Linear(1, 1),
        "function": len,
        "without-repr": WithoutRepr(),
        "list-without-repr": [WithoutRepr()],
        "true": True,
        "false": False,
        "zero": 0,
        "two": 2,
        "half": 0.5,
        "negative": -1,
        "nan": math.nan,
        "inf": math.inf,
        "huge": 10**400,
        "unprintable": 10**5000,
        "complex": 1j,
        "fraction": Fraction(1, 2),
        "decimal": Decimal("0.5"),
        "numpy-float64": np.float64(0.5),
        "numpy-float32": np.float32(0.5),
        "numpy-int": np.int64(1),
        "numpy-bool": np.bool_(True),
        "numpy-0d": np.array(0.5),
        "numpy-array": np.zeros(2),
        "tensor-0d": torch.tensor(0.5),
        "tensor": torch.zeros(2),
        "meta-tensor": torch.tensor(0.5, device="meta"),
    }


def unexpected(
    call: Callable[[object], object],
    message: str,
    fine: Collection[str] = (),
    *,
    error: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError),
    kinds: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """What the call does with each kind of value but take the fine ones and refuse the others.

    To refuse is to raise this error with this message, in the package's own code, in a short line.
    """
    found = {}
    for kind, value in (values() if kinds is None else kinds).items():
        try:
            call(value)
            answer = "taken"
        except Exception as raised:
            place = traceback.extract_tb(raised.__traceback__)[-1].filename
            answer = f"{type(raised).__name__} in {place}: {raised}"
            if (
                isinstance(raised, error)
                and re.search(message, str(raised))
                and place.startswith(PACKAGE)
                and len(answer) < 400
                and "\n" not in answer
            ):
                answer = "refused"
        if answer != ("taken" if kind in fine else "refused"):
            found[kind] = answer
    return found


class Subclass(Tensor):
    """A tensor that leaves its operations to torch."""


def tensors_like(tensor: Tensor) -> dict[str, Tensor]:
    """Tensors that can't stand where this float32 one can."""
    nested = [tensor, tensor]
    return {
        "sparse": tensor.to_sparse(),
        "mkldnn": tensor.to_mkldnn(),
        "quantized": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor(nested),
        "jagged": torch.nested.nested_tensor(nested, layout=torch.jagged),
        "meta": tensor.to("meta"),
        "fake": FakeTensorMode().from_tensor(tensor.clone()),
        "lazy": nn.UninitializedParameter(),
        "lazy-buffer": nn.UninitializedBuffer(),
        "int64": tensor.to(torch.int64),
        "int8": tensor.to(torch.int8),
        "bool": tensor > 0,
        "complex": tensor.to(torch.complex64),
        "float8": tensor.to(torch.float8_e4m3fn),
        "0d": tensor.sum(),
        "no-columns": tensor[..., :0],
    }


def others_like(tensor: Tensor) -> dict[str, Tensor]:
    """Tensors of other kinds, with the same values, that can."""
    with torch.inference_mode():
        inference = tensor.clone()
    return {
        "parameter": nn.Parameter(tensor),
        "buffer": nn.Buffer(tensor),
        "subclass": tensor.as_subclass(Subclass),
        "negated-view": torch._neg_view(-tensor),
        "inference": inference,
    }
