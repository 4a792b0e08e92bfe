"""The fuzzer finds planted faults, and prints a command that reproduces each."""

import runpy
from pathlib import Path

import pytest
import torch
from random_calls import Case, check

from fastlora.backends import formula
from fastlora.backends.dropout import DropoutMask

main = runpy.run_path(str(Path(__file__).parents[1] / "fuzz.py"))["main"]


through, product = formula._through_lora_a, formula.product
ANOTHER = DropoutMask(torch.tensor([99]), (1000, 24), 0.3)
FAULTS = {
    "another-mask-in-the-backward": (
        formula, "_through_lora_a", "d_x",
        lambda x, dh, a, mask, *rest: through(x, dh, a, mask and ANOTHER, *rest),
    ),
    "a-hundredth-of-the-scale": (
        formula, "product", "y0",
        lambda left, right, scale, out=None: product(left, right, scale * 1.01, out),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_mistakes_that_kernels_were_shipped_with_are_misses(name, monkeypatch):
    """Each fault makes a call fail that passes without it."""
    place, attribute, said, wrong = FAULTS[name]
    fixed = {"kind": "layer", "p": 0.3, "world": "eager", "format": "", "M": 40, "K": 24}
    case = lambda: Case(0, 1, "torch", small=True, node=True, dtype=torch.float32, **fixed)  # noqa: E731
    check(case())
    monkeypatch.setattr(place, attribute, wrong)
    with pytest.raises(AssertionError, match=said):
        check(case())


def test_a_miss_is_a_line_that_finds_it_again(monkeypatch, capsys):
    right = formula.thin_gradient
    monkeypatch.setattr(formula, "thin_gradient", lambda dy, h: -right(dy, h))
    assert main(["--seed", "11", "--count", "6", "--only", "layer f32-f32 eager"]) == 1
    line = capsys.readouterr().out.splitlines()[0]
    command, said = line.split("  # ")
    assert "d_lora_b" in said
    arguments = command.removeprefix("python -m tests.fuzz ").split()
    assert main(arguments) == 1
    assert capsys.readouterr().out.splitlines()[0] == line
    monkeypatch.undo()
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("1 cases (layer 1), 0 missed")
