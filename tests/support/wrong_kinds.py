"""Values of every kind, for arguments that expect another kind."""

import math
import re
import traceback
from collections.abc import Callable, Collection, Mapping
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fastlora

PACKAGE = str(Path(fastlora.__file__).parent)


class WithoutRepr:
    """An object that can be neither printed nor compared."""

    __hash__ = None

    def __repr__(self):
        raise RuntimeError("no repr")

    def __eq__(self, other):
        raise RuntimeError("no comparison")


def values() -> dict[str, object]:
    """Made anew in each call, because some values can be used only once."""
    return {
        "none": None,
        "text": "a",
        "long-text": "a" * 10**5,
        "bytes": b"a",
        "list": [0.5],
        "empty-list": [],
        "dict": {},
        "iterator": iter(["up"]),
        "object": object(),
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
        "huge": 10**400,
        "unprintable": 10**5000,
        "complex": 1j,
        "decimal": Decimal("0.5"),
        "numpy-float64": np.float64(0.5),
        "numpy-int": np.int64(1),
        "numpy-array": np.zeros(2),
        "tensor-0d": torch.tensor(0.5),
        "tensor": torch.zeros(2),
    }


def unexpected(
    call: Callable[[object], object],
    message: str,
    fine: Collection[str] = (),
    *,
    error: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError),
    kinds: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """The kinds of values that the call treats wrongly, each with its outcome."""
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
    """A tensor subclass that changes no operation."""


def tensors_like(tensor: Tensor) -> dict[str, Tensor]:
    """Tensors that the package must refuse in the place of this float32 tensor."""
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
    """Tensors of other classes with the same values, which the package must accept."""
    with torch.inference_mode():
        inference = tensor.clone()
    return {
        "parameter": nn.Parameter(tensor),
        "buffer": nn.Buffer(tensor),
        "subclass": tensor.as_subclass(Subclass),
        "negated-view": torch._neg_view(-tensor),
        "inference": inference,
    }
