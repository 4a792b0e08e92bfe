"""The launches of a call with a given shape.  They are recorded on meta tensors; nothing runs."""

import os
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import BackwardCall, Call, backend_name, find_backend, planned_backend, use_backend
from ..backends.products import is_slow
from ..formats.format import name_of
from ..projection import DTYPES, HALF_DTYPES, Layout, unflatten

NAMES = {name_of(dtype): dtype for dtype in DTYPES}


class Asked(NamedTuple):
    """A call: x [m, k], weight [n, k] and an adapter of rank r; on a target, or on this machine."""

    m: int
    k: int
    n: int
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    target: str = ""  # a name in TARGETS of the Triton backend

    def __str__(self) -> str:
        return (
            f"x [{self.m}, {self.k}], weight [{self.n}, {self.k}], r {self.r}, "
            f"{name_of(self.dtype)}, dropout {self.dropout:g}"
        )


def would_run(asked: Asked, device: torch.device) -> dict[str, str]:
    """The backend and the reason for it.  On Triton also each launch and product, in order."""
    m, k, n, r = asked[:4]
    seeds = torch.empty(1, dtype=torch.int64, device="meta") if asked.dropout else None
    shapes = (m, k), (n, k), (r, k), (n, r)  # x, weight, lora_a, lora_b
    inputs = [torch.empty(shape, dtype=asked.dtype, device="meta") for shape in shapes]
    layouts, noted = (Layout(False, (1.0,)),), _Noted()
    with ExitStack() as stack:
        if asked.target:
            stack.enter_context(use_backend("triton"))
        default = backend_name(device=device)
        if default == "triton":
            from ..backends.triton import without_launching  # late: it imports the kernels

            stack.enter_context(without_launching(noted.add_launch, asked.target or device))
        name, reason = planned_backend(unflatten(inputs[1:], layouts), device)
        why = f"not {default}: {reason}" if reason else _why(asked, device)
        where = f"{asked}, on {asked.target or device.type}"
        entries = {"call": where, "backend": f"{name}, {why}"}
        if name != "triton":  # on meta tensors the torch backend cuts other blocks than here
            return entries
        backend = find_backend(name)
        call = Call(layouts, asked.dropout, backend)
        stack.enter_context(noted)
        ys, hs = backend.forward(inputs, seeds, call)
        forward, noted.steps = noted.steps, []
        needs = True, False, True, True
        backend.backward(BackwardCall(ys, inputs, hs, needs, seeds, call))
    ways = {"forward": forward, "backward": noted.steps}
    # The weight is frozen, so a product by torch can only be the base's.
    words = ["in place" if "torch." in "".join(steps) else "fused" for steps in ways.values()]
    entries["plan"] = "{} forward, {} dx (docs/gpu.md)".format(*words)
    for title, steps in ways.items():
        entries |= {f"{title} {i}": step for i, step in enumerate(steps, 1)}
    return entries


def _why(asked: Asked, device: torch.device) -> str:
    """Why this backend was chosen."""
    if asked.target:
        return "the default there"
    if os.environ.get("FASTLORA_BACKEND"):
        return "by FASTLORA_BACKEND"
    if device.type == "cpu" and asked.dtype in HALF_DTYPES and is_slow(asked.dtype):
        return f"the default here; {name_of(asked.dtype)} is slow here, so products run in float32"
    return "the default here"


class _Noted(TorchDispatchMode):
    """Records launches of kernels and products by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def add_launch(self, launch: Any) -> None:
        work, grid = launch.work(), "x".join(map(str, launch.grid))
        tiles = [f"{k} {v}" for k, v in launch.arguments.items() if k.startswith("BLOCK_")]
        facts = [f"grid {grid}", *tiles, f"{launch.warps} warps", f"{launch.stages} stages"]
        facts += [f"{work.loaded / 2**20:.1f} MiB in", f"{work.stored / 2**20:.1f} MiB out"]
        self.steps.append(f"{launch.name}: {', '.join(facts)}")

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        name = operation.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = (list(matrix.shape) for matrix in arguments[-2:])
            self.steps.append(f"torch.{name}: {left} @ {right}")
        return operation(*arguments, **(named or {}))
