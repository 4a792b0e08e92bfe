"""Every number in the README comes from a committed results file: its tables are made from them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# <!-- benchmarks/report.py ARGUMENTS -->, then the table, up to the next empty line.
TABLES = re.findall(
    r"<!-- (benchmarks/report\.py [^\n]*) -->\n\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.S
)


@pytest.mark.parametrize(("command", "table"), TABLES, ids=[command for command, _ in TABLES])
def test_a_table_is_what_its_command_prints(command, table):
    result = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == table


def test_there_are_tables():
    assert len(TABLES) >= 2
