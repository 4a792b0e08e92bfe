"""The budget of pyproject.toml: lines of code in each folder, and sentences that are hard to read.

A change that needs more raises the number in its own diff.
"""

import budget
import pytest

LIMITS = [
    (kind, folders, most)
    for kind, limits in budget.budget().items()
    for folders, most in limits.items()
]


@pytest.mark.parametrize(("kind", "folders", "most"), LIMITS, ids=str)
def test_the_repository_keeps_to_its_budget(kind, folders, most):
    assert budget.measured(kind, folders) <= most


def test_the_budget_names_all_folders():
    assert {kind for kind, _, _ in LIMITS} == {"lines", "sentences"}
    assert {"fastlora", "kernels", "tests", "benchmarks tools"} <= {each for _, each, _ in LIMITS}


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("# Of two tensors the first.\n", 1),
        ("# The first of two tensors.\n", 0),
        ('"""What is kept."""\n', 1),
        ('raise ValueError("nobody asks for this")\n', 1),
        ("x = 1  # it is cached because the key is the same\n", 0),
    ],
)
def test_hard_sentences_are_found(text, marked, tmp_path):
    path = tmp_path / "some.py"
    path.write_text(text)
    assert len(budget.hard(path)[1]) == marked


def test_lines_of_code_leave_out_comments_docstrings_and_blank_lines(tmp_path):
    path = tmp_path / "some.py"
    path.write_text('"""Docstring."""\n\n# comment\nx = [\n    1,\n]  # three lines\n')
    assert budget.lines_of_code(path) == 3
