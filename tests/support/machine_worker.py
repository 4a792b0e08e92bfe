"""What tests/kernels/test_machine.py asks the machine, for the targets that it is called with.

A process of its own, since it isn't the interpreter's: it prints JSON, each function's results by
target.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import torch
from machine import driver  # before Triton
from machine.memory import RACES

import fastlora
from fastlora.kernels import gated_backward, kept, lowrank

BF16 = torch.bfloat16


def ran(run: Callable[[], object], order: int = 0) -> driver.Session:
    with driver.use(driver.Session(order)) as session:
        run()
    return session


def gradients_in_place(apart: int = 0) -> None:
    """d_gate is written over dy, so many elements behind it."""
    memory, gate, up = (torch.randn(3 * 2048 + 8).to(BF16) for _ in range(3))
    dy, d_gate, gate, up = (
        each[at : at + 3 * 2048].view(3, 2048)
        for each, at in ((memory, 0), (memory, apart), (gate, 0), (up, 0))
    )
    gated_backward(dy, gate, up, "silu", d_gate, torch.empty_like(dy))


def added_in_place() -> None:
    """The low-rank term is added to what is there: with whole tiles and ragged ones."""
    for rows, columns in ((128, 128), (70, 75)):
        out, u, v = torch.randn(rows, columns), torch.randn(rows, 8), torch.randn(8, columns)
        for dtype in (BF16, torch.float32):
            lowrank(out.to(dtype), [u.to(dtype)], [v], precision="ieee", add=True)


def races() -> dict[str, list[str]]:
    """The kinds that the machine sees, by how far the result lies from the operand."""
    calls = {
        "dy": gradients_in_place, "add": added_in_place,
        "one element further": lambda: gradients_in_place(1),
        "a vector further": lambda: gradients_in_place(8),
    }  # fmt: skip
    return {
        name: sorted({found.kind for each in ran(call).ran for found in each.findings} & RACES)
        for name, call in calls.items()
    }


def replays() -> dict[str, str]:
    """What is said of a kept call, and of the same with a spoiled script."""
    x = torch.randn(40, 64, dtype=BF16, requires_grad=True)
    weight, b = torch.randn(48, 64, dtype=BF16), torch.randn(48, 8, requires_grad=True)
    a = torch.randn(8, 64, requires_grad=True)

    def call() -> list[torch.Tensor]:
        y = fastlora.lora_linear(x, weight, a, b, backend="triton")
        return [y.detach(), *torch.autograd.grad(y, [x, a, b], torch.ones_like(y))]

    call()
    whole, scripts = call(), dict(kept._calls)
    spoiled = {
        "nothing": lambda source: source,
        "a grid": lambda source: re.sub(r"(launch\()\d+, 1, 1", r"\g<1>0, 1, 1", source),
        "an address": lambda source: re.sub(r"(t\d+\.data_ptr\(\))", r"\1 + 2**40", source),
        "a buffer": lambda source: re.sub(r"(room = .*\(\()\d+,", r"\g<1>8,", source),
    }
    found = {}
    for name, spoil in spoiled.items():
        for key, script in scripts.items():
            source, scope = spoil(script.source), dict(script.replay.__globals__)
            exec(compile(source, driver.KEPT, "exec"), scope)
            replay = partial(scope["forward"], script.replay.__self__)
            kept._calls[key] = script._replace(replay=replay, source=source)
        try:
            again = call()
            found[name] = "" if all(map(torch.equal, whole, again)) else "other results"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors are NaN
    found = {}
    for name in sys.argv[1:]:
        driver.install(name)
        kept._calls.clear()
        torch.manual_seed(0)
        found[name] = {each.__name__: each() for each in (races, replays)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
