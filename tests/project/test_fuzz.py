"""The fuzz passes; it finds a planted fault, and its line finds that again."""

import runpy
from pathlib import Path

from fastlora.backends import formula

main = runpy.run_path(str(Path(__file__).parents[1] / "fuzz.py"))["main"]


def test_forty_cases_pass(capsys):
    failed = main(["--seed", "11", "--count", "40"])
    *misses, sums = capsys.readouterr().out.splitlines()
    assert not failed, misses
    assert sums.startswith("40 cases (dora ")


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
